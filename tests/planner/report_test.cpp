#include "dualpipe/planner/report.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <string_view>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::planner {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

Interval compute(int rank, std::string_view step, double begin, double end) {
  return {rank, Lane::compute, parse_step(step), begin, end};
}
Interval node(int rank, std::string_view op, double begin, double end, std::string name = "node") {
  return {rank, Lane::node, {parse_op(op), {}}, begin, end, std::move(name)};
}
Interval collective(int rank, std::string_view op, double begin, double end, std::string name = "collective") {
  return {rank, Lane::collective, {parse_op(op), {}}, begin, end, std::move(name)};
}

TEST(Report, CountsFromTheFirstBeginToTheLastEnd) {
  const Timeline timeline{
      .name = "t", .num_ranks = 3, .intervals = {compute(0, "0F0", 10, 12), compute(1, "1F0", 13, 17)}};
  const Report result = report(timeline);
  EXPECT_EQ(result.makespan, 7);
  EXPECT_EQ(extent(timeline), (Window{10, 17}));
  ASSERT_EQ(result.ranks.size(), 3U);
  EXPECT_EQ(result.ranks[0].busy, 2);
  EXPECT_EQ(result.ranks[0].compute, 2);
  EXPECT_EQ(result.ranks[0].bubble, 5);
  EXPECT_EQ(result.ranks[1].busy, 4);
  EXPECT_EQ(result.ranks[1].bubble, 3);
  EXPECT_EQ(result.ranks[2].busy, 0);
  EXPECT_EQ(result.ranks[2].bubble, 7);
  EXPECT_EQ(result.ranks[1].rank, 1);
  EXPECT_EQ(result.total().compute, 6);
  EXPECT_EQ(result.total().bubble, 15);
}

TEST(Report, TransfersAreTheUnionOfBothLanesAndHiddenWhereTheyLieUnderCompute) {
  const Step step = parse_step("0F0");
  const Timeline timeline{.name = "t",
                          .num_ranks = 1,
                          .intervals = {{0, Lane::send, step, 1, 3},
                                        {0, Lane::receive, step, 2, 5},
                                        {0, Lane::receive, step, 7, 9},
                                        compute(0, "0F0", 0, 4),
                                        compute(0, "0F1", 4, 4.5),
                                        compute(0, "0F2", 8, 10)}};
  const RankReport rank = report(timeline).ranks[0];
  EXPECT_EQ(rank.transfers.hidden, 3.5 + 1);
  EXPECT_EQ(rank.transfers.exposed, 0.5 + 1);
  EXPECT_EQ(rank.collectives.total(), 0);
  EXPECT_EQ(rank.compute, 6.5);
  EXPECT_EQ(rank.bubble, 3.5);  // that a transfer is under way in a part of it does not make it smaller
}

TEST(Report, SumsOfGradientsMayEndBehindTheLastComputing) {
  const Step sum{parse_op("0W0"), {}};
  Timeline timeline{.name = "t",
                    .num_ranks = 2,
                    .intervals = {compute(0, "0B0", 0, 4),
                                  compute(0, "1B0", 6, 8),
                                  {0, Lane::reduction, sum, 3, 7},
                                  {0, Lane::reduction, sum, 9, 11},
                                  compute(1, "2B0", 0, 8)}};
  const Report whole = report(timeline);
  EXPECT_EQ(whole.makespan, 8);
  EXPECT_EQ(whole.ranks[0].reductions.hidden, 1 + 1);
  EXPECT_EQ(whole.ranks[0].reductions.exposed, 2 + 2);
  EXPECT_EQ(whole.ranks[0].bubble, 2);
  EXPECT_EQ(whole.ranks[0].transfers.total(), 0);
  EXPECT_EQ(whole.ranks[1].reductions.total(), 0);
  EXPECT_EQ(whole.total().reductions.total(), 6);
  EXPECT_EQ(report(timeline, {5, 8}).ranks[0].reductions.total(), 2);
  EXPECT_EQ(median({whole, whole}).ranks[0].reductions.exposed, 4);

  // The next step begins at 12.
  timeline.intervals.push_back(compute(0, "0B0", 12, 14));
  timeline.intervals.push_back({0, Lane::reduction, sum, 14, 15});
  const std::vector<Timeline> steps = split_steps(timeline);
  ASSERT_EQ(steps.size(), 2U);
  EXPECT_EQ(report(steps[0]).ranks[0].reductions.total(), 6);
  EXPECT_EQ(report(steps[1]).ranks[0].reductions.exposed, 1);
}

// By hand:     0    1    2    3    4    5    6    7    8    9   10   11   12
// step         [(0F1;0B0)...............................]    [0F2.........]
// compute           A-F  A-F  .    M-B  M-B  M-W  .     .    [node F 9-10]
// collective   [combine-B.....]    [dispatch-F 3-6 ][6-7.5]       [10-11.5]
// receive                     [2.5 ............. 5.5]   [8-9]
TEST(Report, ACollectiveIsHiddenUnderTheNodesThatCompute) {
  const Timeline timeline{.name = "t",
                          .num_ranks = 1,
                          .intervals = {compute(0, "(0F1;0B0)OVERLAP_F_B", 0, 8),
                                        node(0, "0F1", 1, 3),
                                        node(0, "0I0", 4, 6),
                                        node(0, "0W0", 6, 7),
                                        collective(0, "0B0", 0, 2.5),
                                        collective(0, "0F1", 3, 6),
                                        collective(0, "0B0", 6, 7.5),
                                        compute(0, "0F2", 9, 12),
                                        node(0, "0F2", 9, 10),
                                        collective(0, "0F2", 10, 11.5),
                                        {0, Lane::receive, parse_step("1I0"), 2.5, 5.5},
                                        {0, Lane::receive, parse_step("1I1"), 8, 9}}};
  const RankReport rank = report(timeline).ranks[0];
  EXPECT_EQ(rank.busy, 8 + 3);
  EXPECT_EQ(rank.compute, 2 + 2 + 1 + 1);
  EXPECT_EQ(rank.collectives.hidden, 1.5 + 2 + 1);
  EXPECT_EQ(rank.collectives.exposed, 1 + 1 + 0.5 + 1.5);
  EXPECT_EQ(rank.transfers.hidden, 0.5 + 1.5);
  EXPECT_EQ(rank.transfers.exposed, 1 + 1);
  EXPECT_EQ(rank.bubble, 12 - 6 - 4);

  // The same between 2 and 6.5: what reaches beyond is cut.
  const Report part = report(timeline, {2, 6.5});
  EXPECT_EQ(part.makespan, 4.5);
  EXPECT_EQ(part.ranks[0].busy, 4.5);
  EXPECT_EQ(part.ranks[0].compute, 1 + 2 + 0.5);
  EXPECT_EQ(part.ranks[0].collectives.hidden, 0.5 + 2 + 0.5);
  EXPECT_EQ(part.ranks[0].collectives.exposed, 1);
  EXPECT_EQ(part.ranks[0].bubble, 0);
}

TEST(Report, StepsWithoutNodesComputeAsAWholeBesideOthersThatHaveThem) {
  // The weight part of a micro-batch whose nodes are known, and a step of a stage that does not communicate.
  const Timeline timeline{.name = "t",
                          .num_ranks = 1,
                          .intervals = {compute(0, "0I0", 0, 3), node(0, "0I0", 0, 1), collective(0, "0I0", 1, 3),
                                        compute(0, "0W0", 3, 4), compute(0, "1F0", 4, 6),
                                        // A stage that only communicates has no node.
                                        compute(0, "2F0", 6, 8), collective(0, "2F0", 6, 7.5)}};
  const RankReport rank = report(timeline).ranks[0];
  EXPECT_EQ(rank.compute, 1 + 1 + 2);
  EXPECT_EQ(rank.collectives.exposed, 2 + 1.5);
  EXPECT_EQ(rank.bubble, 0.5);
}

TEST(Report, WhatLiesBeforeTheFirstOrBehindTheLastComputeIsNotCounted) {
  const Timeline timeline{
      .name = "t",
      .num_ranks = 1,
      .intervals = {compute(0, "0F0", 2, 4), collective(0, "7F7", 0, 3), collective(0, "7F7", 5, 9)}};
  EXPECT_EQ(report(timeline).ranks[0].collectives.total(), 1);
}

TEST(Report, EveryRanksTimeIsComputeExposedOrBubble) {
  const unsigned seed = 20251125;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> time(0, 10);
  for (int trial = 0; trial < 300; ++trial) {
    Timeline timeline{.name = "t", .num_ranks = 1 + static_cast<int>(random() % 4), .intervals = {}};
    for (int rank = 0; rank < timeline.num_ranks; ++rank) {
      double now = time(random);
      for (int i = 0; i < static_cast<int>(random() % 12); ++i) {  // steps one after the other, nodes inside
        const double begin = now + time(random) * static_cast<double>(random() % 2), end = begin + time(random);
        const std::string op = detail::str(rank, "FIWB"[random() % 4], i);
        timeline.intervals.push_back(compute(rank, op, begin, end));
        for (double at = begin; random() % 3 != 0 && at < end;) {
          const double from = at + (end - at) * 0.3, to = from + (end - from) * 0.4;
          timeline.intervals.push_back(node(rank, op, from, to));
          at = to;
        }
        now = end;
      }
      for (int i = 0; i < static_cast<int>(random() % 8); ++i) {  // anywhere, also over each other
        const double begin = 5 * time(random);
        timeline.intervals.push_back(collective(rank, "0F0", begin, begin + time(random)));
        timeline.intervals.push_back(
            {rank, random() % 2 ? Lane::send : Lane::receive, parse_step("0F0"), begin + 1, begin + 1 + time(random)});
      }
    }
    std::shuffle(timeline.intervals.begin(), timeline.intervals.end(), random);
    const Window whole = extent(timeline);
    const double third = whole.begin + whole.length() / 3;
    const Report all = report(timeline), before = report(timeline, {whole.begin, third}),
                 after = report(timeline, {third, whole.end});
    for (int rank = 0; rank < timeline.num_ranks; ++rank) {
      const auto& usage = all.ranks[static_cast<std::size_t>(rank)];
      EXPECT_NEAR(usage.compute + usage.collectives.exposed + usage.bubble, all.makespan, 1e-9);
      EXPECT_LE(usage.compute, usage.busy + 1e-9);
      // Counted at a thousand instants, as one would with a ruler.
      const auto under = [&](double at, auto... lanes) {
        return std::any_of(timeline.intervals.begin(), timeline.intervals.end(), [&](const Interval& interval) {
          return interval.rank == rank && ((interval.lane == lanes) || ...) && interval.begin <= at &&
                 at < interval.end;
        });
      };
      double collectives = 0, transfers = 0;
      constexpr int instants = 1000;
      for (int i = 0; i < instants; ++i) {
        const double at = whole.begin + whole.length() * (i + 0.5) / instants;
        collectives += under(at, Lane::collective);
        transfers += under(at, Lane::send, Lane::receive);
      }
      EXPECT_NEAR(usage.collectives.total(), collectives / instants * whole.length(), 0.02 * whole.length());
      EXPECT_NEAR(usage.transfers.total(), transfers / instants * whole.length(), 0.02 * whole.length());
      // Two windows that meet add up.
      const auto& left = before.ranks[static_cast<std::size_t>(rank)];
      const auto& right = after.ranks[static_cast<std::size_t>(rank)];
      EXPECT_NEAR(left.compute + right.compute, usage.compute, 1e-9);
      EXPECT_NEAR(left.bubble + right.bubble, usage.bubble, 1e-9);
      EXPECT_NEAR(left.busy + right.busy, usage.busy, 1e-9);
      EXPECT_NEAR(left.collectives.hidden + right.collectives.hidden, usage.collectives.hidden, 1e-9);
      EXPECT_NEAR(left.transfers.exposed + right.transfers.exposed, usage.transfers.exposed, 1e-9);
    }
    if (HasFailure()) break;
  }
}

TEST(Report, PeakActivationsFollowTheOrderOfSteps) {
  Timeline timeline{.name = "t",
                    .num_ranks = 1,
                    .intervals = {compute(0, "0F0", 0, 1), compute(0, "0F1", 1, 2),
                                  compute(0, "(0F2;0B0)OVERLAP_F_B", 2, 5),  // three are held in it
                                  compute(0, "0I1", 5, 6), compute(0, "0W1", 6, 7), compute(0, "0B2", 7, 9)}};
  EXPECT_EQ(report(timeline).ranks[0].peak_activations, 3);
  // The order of the list does not matter where the clock tells.
  std::reverse(timeline.intervals.begin(), timeline.intervals.end());
  EXPECT_EQ(report(timeline).ranks[0].peak_activations, 3);
}

TEST(Report, StepsWithoutDurationKeepTheOrderOfTheList) {
  const Timeline timeline{.name = "t",
                          .num_ranks = 1,
                          .intervals = {compute(0, "0F0", 0, 0), compute(0, "0B0", 0, 0), compute(0, "0F1", 0, 0),
                                        compute(0, "0B1", 0, 0)}};
  EXPECT_EQ(report(timeline).ranks[0].peak_activations, 1);
  EXPECT_EQ(report(timeline).makespan, 0);
}

TEST(Report, EmptyTimelines) {
  EXPECT_EQ(report({}).makespan, 0);
  EXPECT_TRUE(report({}).ranks.empty());
  EXPECT_EQ(report({.name = "t", .num_ranks = 2, .intervals = {}}).ranks.size(), 2U);
  EXPECT_EQ(main_part({}), std::nullopt);
  EXPECT_EQ(split_steps({}).size(), 1U);
}

TEST(Report, RefusesARankThatTheTimelineLacks) {
  const Timeline timeline{.name = "t", .num_ranks = 2, .intervals = {compute(2, "0F0", 0, 1)}};
  EXPECT_THAT([&] { report(timeline); }, ThrowsMessage<InvalidArgument>(HasSubstr("rank 2 in a timeline of 2 ranks")));
}

TEST(MainPart, IsWhereAllRanksRunPairsAndNothingElse) {
  const Timeline timeline{
      .name = "t",
      .num_ranks = 2,
      .intervals = {compute(0, "(0F1;0B0)OVERLAP_F_B", 0, 3), compute(0, "0F2", 3, 4),
                    compute(0, "(0F3;0B1)OVERLAP_F_B", 4, 7), compute(0, "(0F4;0B2)OVERLAP_F_B", 8, 11),
                    compute(0, "0B3", 11, 13), compute(0, "(0F5;0B4)OVERLAP_F_B", 13, 16),
                    compute(1, "(1F1;1B0)OVERLAP_F_B", 5, 8), compute(1, "(1F2;1B1)OVERLAP_F_B", 8, 11),
                    compute(1, "(1F3;1B2)OVERLAP_F_B", 11, 14)}};
  EXPECT_EQ(main_part(timeline), (Window{5, 11}));
}

TEST(MainPart, IsStepFourOfDualPipe) {
  // Rank 0 is the last to begin its step 4 and the first to end it: 2 * (20 / 2 - 8 + 1) pairs of 3.
  const Timeline timeline = simulate(make_schedule({"dualpipe", 8, 20})).timeline;
  const std::optional<Window> part = main_part(timeline);
  ASSERT_TRUE(part);
  EXPECT_EQ(part->length(), 3 * 2 * (20 / 2 - 8 + 1));
  for (const RankReport& rank : report(timeline, *part).ranks) EXPECT_EQ(rank.compute, part->length());
  // Ranks without pairs have none; nor have ranks whose main parts have no time in common.
  EXPECT_EQ(main_part(simulate(make_schedule({"1f1b", 4, 8})).timeline), std::nullopt);
  EXPECT_EQ(main_part(simulate(make_schedule({"dualpipe", 8, 14})).timeline), std::nullopt);
}

TEST(Steps, ANewOneBeginsWhereARankRepeatsAnOp) {
  Timeline three{.name = "run", .num_ranks = 4, .intervals = {}};
  const Timeline one = simulate(make_schedule({"dualpipe", 4, 8}), {.send = 0.5}).timeline;
  const double length = extent(one).length();
  for (int step = 0; step < 3; ++step)
    for (Interval interval : one.intervals) {
      interval.begin += step * (length + 1), interval.end += step * (length + 1);
      three.intervals.push_back(interval);
    }
  const std::vector<Timeline> steps = split_steps(three);
  ASSERT_EQ(steps.size(), 3U);
  for (int step = 0; step < 3; ++step) {
    const Timeline& part = steps[static_cast<std::size_t>(step)];
    EXPECT_EQ(part.intervals.size(), one.intervals.size());
    EXPECT_EQ(part.name, detail::str("run, step ", step + 1, " of 3"));
    EXPECT_NEAR(report(part).makespan, length, 1e-9);
    EXPECT_NEAR(report(part).total().transfers.total(), report(one).total().transfers.total(), 1e-9);
  }
  EXPECT_EQ(split_steps(one).size(), 1U);
  EXPECT_EQ(split_steps(one)[0].name, one.name);
}

TEST(Median, NumberByNumber) {
  const auto of = [](double makespan, double computing, double hidden) {
    Report result{.makespan = makespan, .ranks = {RankReport{}}};
    result.ranks[0].compute = computing;
    result.ranks[0].collectives.hidden = hidden;
    return result;
  };
  const Report result = median({of(9, 1, 5), of(4, 2, 7), of(5, 3, 6)});
  EXPECT_EQ(result.makespan, 5);
  EXPECT_EQ(result.ranks[0].compute, 2);
  EXPECT_EQ(result.ranks[0].collectives.hidden, 6);
  EXPECT_EQ(median({of(1, 8, 0), of(2, 7, 0)}).makespan, 1);  // of two, the lower
  EXPECT_THAT([] { median({}); }, ThrowsMessage<InvalidArgument>(HasSubstr("no report")));
  EXPECT_THAT([&] { median({of(1, 1, 1), Report{}}); }, ThrowsMessage<InvalidArgument>(HasSubstr("1 and 0 ranks")));
}

}  // namespace
}  // namespace dualpipe::planner
