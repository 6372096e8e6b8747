#include "dualpipe/planner/compare.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/error.hpp"

namespace dualpipe::planner {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

const ComparedSchedule* find(const Comparison& comparison, const std::string& name, int ranks, int micro_batches) {
  const auto found = std::find_if(comparison.rows.begin(), comparison.rows.end(), [&](const ComparedSchedule& row) {
    return row.name == name && row.num_ranks == ranks && row.num_micro_batches == micro_batches;
  });
  return found == comparison.rows.end() ? nullptr : &*found;
}

TEST(Compare, EveryCombinationIsARow) {
  const ComparisonSpec spec{.ranks = {4, 7, 8}, .micro_batches = {6, 16, 17}};
  std::vector<int> progress;
  ComparisonSpec observed = spec;
  observed.progress = [&](int done, int all) {
    EXPECT_EQ(all, static_cast<int>(9 * schedule_kinds().size()));
    progress.push_back(done);
  };
  const Comparison result = compare(observed, {});
  ASSERT_EQ(result.rows.size(), 9 * schedule_kinds().size());
  EXPECT_EQ(progress.size(), result.rows.size());
  EXPECT_EQ(progress.back(), static_cast<int>(result.rows.size()));
  std::set<std::tuple<std::string, int, int>> seen;
  for (const ComparedSchedule& row : result.rows) {
    seen.insert({row.name, row.num_ranks, row.num_micro_batches});
    std::string refused;
    try {
      make_schedule({row.name, row.num_ranks, row.num_micro_batches});
    } catch (const InvalidArgument& error) {
      refused = error.what();
    }
    EXPECT_EQ(row.refused, refused);
    EXPECT_EQ(row.makespan > 0, refused.empty());
  }
  EXPECT_EQ(seen.size(), result.rows.size());
  EXPECT_THAT(find(result, "dualpipe", 7, 16)->refused, HasSubstr("even number of ranks, got 7"));
}

TEST(Compare, RowsHaveTheClosedForms) {
  const Comparison result = compare({.ranks = {8}, .micro_batches = {20, 16}, .publish = Publish::atomic}, {});
  EXPECT_EQ(result.described_stages, 8);
  const ComparedSchedule& dualpipe = *find(result, "dualpipe", 8, 20);
  EXPECT_DOUBLE_EQ(dualpipe.makespan, 66);
  EXPECT_DOUBLE_EQ(dualpipe.per_micro_batch, 3.3);
  EXPECT_DOUBLE_EQ(dualpipe.bubble, 6);
  EXPECT_DOUBLE_EQ(dualpipe.efficiency, 60.0 / 66);
  EXPECT_EQ(dualpipe.peak_activations, 9);
  EXPECT_DOUBLE_EQ(dualpipe.peak_memory, 9);
  EXPECT_EQ(dualpipe.num_transfers, 2 * 7 * 20);
  EXPECT_DOUBLE_EQ(find(result, "1f1b", 8, 20)->makespan, 3 * (20 + 7));
  EXPECT_DOUBLE_EQ(find(result, "gpipe", 8, 16)->makespan, 3 * (16 + 7));
  EXPECT_EQ(find(result, "gpipe", 8, 16)->peak_activations, 16);
  // Two stages on each rank, of half the model's eighth: the same work, activations of half the size.
  const ComparedSchedule& folded = *find(result, "dualpipev", 8, 20);
  EXPECT_EQ(folded.peak_activations, 17);
  EXPECT_DOUBLE_EQ(folded.peak_memory, 8.5);
  EXPECT_NEAR(folded.makespan - folded.bubble, 60, 1e-9);
}

TEST(Compare, SortsByTimePerMicroBatchRefusedLast) {
  const Comparison result = compare({.ranks = {4, 8}, .micro_batches = {8, 16, 20, 64}}, {});
  bool refused = false;
  for (std::size_t i = 0; i < result.rows.size(); ++i) {
    EXPECT_GE(!result.rows[i].refused.empty(), refused);
    refused = !result.rows[i].refused.empty();
    if (i == 0 || refused) continue;
    EXPECT_LE(result.rows[i - 1].per_micro_batch, result.rows[i].per_micro_batch * (1 + 1e-6));
  }
  EXPECT_TRUE(refused);
}

TEST(Compare, MoreRanksTrainTheSameModel) {
  // Without a bubble, twice as many ranks would take half as long: N large.
  const Comparison result = compare({.kinds = {"dualpipe"}, .ranks = {4, 8}, .micro_batches = {1000}}, {});
  EXPECT_EQ(result.described_stages, 4);
  EXPECT_NEAR(find(result, "dualpipe", 4, 1000)->per_micro_batch / find(result, "dualpipe", 8, 1000)->per_micro_batch,
              2, 0.01);
  CostModel model;
  model.memory.state = 6;
  model.memory.activation = 0;
  const Comparison states = compare({.ranks = {4, 8}, .micro_batches = {32}}, model);
  EXPECT_DOUBLE_EQ(find(states, "dualpipe", 4, 32)->peak_memory, 12);  // two copies
  EXPECT_DOUBLE_EQ(find(states, "dualpipev", 4, 32)->peak_memory, 6);
  EXPECT_DOUBLE_EQ(find(states, "dualpipe", 8, 32)->peak_memory, 6);
  EXPECT_DOUBLE_EQ(find(states, "1f1b", 8, 32)->peak_memory, 3);
}

TEST(Compare, UnevenCostsMeasuredOnOnePlanServeTheOthers) {
  CostModel model;
  model.time.stages = {{1.3, 2.6, 1.3}, {1, 2, 1}, {1, 2, 1}, {1.5, 3, 1.5}};
  const Comparison result = compare({.ranks = {2, 4}, .micro_batches = {16}}, model);
  EXPECT_EQ(result.described_stages, 4);
  // The busiest rank sets a bound: with stages on ranks one to one, the last one.
  EXPECT_GE(find(result, "1f1b", 4, 16)->makespan, 16 * 4.5);
  EXPECT_GE(find(result, "1f1b", 2, 16)->makespan, 16 * 7.5);
  // DualPipe's ranks hold both ends of the model: half of the micro-batches on each.
  EXPECT_GE(find(result, "dualpipe", 4, 16)->makespan, 16 * 3 * (1.3 + 1.5) / 2);
  EXPECT_LT(find(result, "dualpipe", 4, 16)->makespan, find(result, "1f1b", 4, 16)->makespan);
}

TEST(Compare, MarksWhatIsOverTheLimit) {
  const Comparison result = compare({.ranks = {8}, .micro_batches = {20}, .memory_limit = 8.5}, {});
  EXPECT_TRUE(find(result, "dualpipe", 8, 20)->over_limit);
  EXPECT_FALSE(find(result, "dualpipev", 8, 20)->over_limit);  // exactly at it
  EXPECT_FALSE(find(result, "1f1b", 8, 20)->over_limit);
  EXPECT_TRUE(find(result, "gpipe", 8, 20)->over_limit);
}

TEST(Compare, TakesSchedulesOfOnesOwn) {
  Schedule own = from_csv(to_csv(make_schedule({"1f1b", 4, 9})), "mine.csv");
  Schedule stuck = from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0\n", "stuck.csv");
  const Comparison result = compare(
      {.kinds = {"1f1b"}, .ranks = {4}, .micro_batches = {9}, .given = {own, stuck}, .described_stages = 4}, {});
  ASSERT_EQ(result.rows.size(), 3U);
  EXPECT_DOUBLE_EQ(find(result, "mine.csv", 4, 9)->makespan, find(result, "1f1b", 4, 9)->makespan);
  EXPECT_THAT(result.rows.back().refused, HasSubstr("cannot run to its end"));
}

TEST(Compare, WhatOneRowLacksIsItsOwnReason) {
  CostModel model;
  model.time.slowdown = {1, 1, 1, 2};
  model.time.sends = {{.rank_a = 4, .rank_b = 5, .duration = 1}};
  const Comparison result = compare({.kinds = {"1f1b"}, .ranks = {2, 4, 8}, .micro_batches = {8}}, model);
  EXPECT_THAT(find(result, "1f1b", 2, 8)->refused, HasSubstr("rank 4, but the schedule has 2"));
  EXPECT_EQ(find(result, "1f1b", 8, 8)->refused, "");
}

TEST(Compare, RefusesWithTheReason) {
  const auto refused = [](const ComparisonSpec& spec, const CostModel& model, const std::string& message) {
    EXPECT_THAT([&] { compare(spec, model); }, ThrowsMessage<InvalidArgument>(HasSubstr(message)));
  };
  refused({}, {}, "nothing to compare");
  refused({.ranks = {4}}, {}, "nothing to compare");
  refused({.ranks = {4}, .micro_batches = {8}, .memory_limit = -1}, {}, "got -1");
  refused({.ranks = {4}, .micro_batches = {8}, .described_stages = -1}, {}, "got -1");
  CostModel model;
  model.time.forward = -2;
  refused({.ranks = {4}, .micro_batches = {8}}, model, "got -2");
  model = {};
  model.time.stages.resize(3);
  refused({.ranks = {4}, .micro_batches = {8}, .described_stages = 4}, model, "costs of 3 stages");
}

}  // namespace
}  // namespace dualpipe::planner
