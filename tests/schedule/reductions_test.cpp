// Sums of gradients in a program: when they are ready, where they stand, and that nobody waits for ever.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "programs.hpp"
#include "reference.hpp"

namespace dualpipe {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;
using Do = Instruction::Do;

constexpr Costs kOrdering{.forward = 1, .backward = 2, .weight = 1, .pair = 3, .send = 0.125};

Program with_sums(const Schedule& schedule, int num_replicas, Publish publish = Publish::early) {
  return lower(schedule, publish, {}, num_replicas);
}

std::vector<int> stages_of_sums(const Program& program) {
  std::vector<int> stages;
  for (const Reduction& reduction : program.reductions) stages.push_back(reduction.stage);
  return stages;
}

bool has_weight_part(const Op& op, int stage) {
  return op.stage == stage && (op.pass == Pass::Backward || op.pass == Pass::BackwardWeight);
}

TEST(Reductions, TheSmallestProgramWordForWord) {
  // Both ranks run 1B of their own and then 0I and 0W of the other's: stage 1 is ready first.
  const Program program = with_sums(make_schedule({"dualpipe", 2, 2}), 1);
  EXPECT_EQ(program.reductions, (std::vector<Reduction>{{1, {0, 1}, 4}, {0, {0, 1}, 4}}));
  std::string text;
  for (const Instruction& instruction : program.ranks[0]) {
    if (instruction.what == Do::compute) text += " " + to_string(instruction.step);
    if (instruction.what == Do::reduce) text += " sum" + std::to_string(instruction.transfer);
  }
  EXPECT_EQ(text, " 0F0 1F1 1B1 sum0 0I0 0W0 sum1");
}

/// Even where a rank runs a stage for none of those that are left.
TEST(Reductions, OfFewerMicroBatchesAreThoseOfAllHolders) {
  for (const std::string& kind : schedule_kinds()) {
    const Schedule all = make_schedule({kind, 4, 10});
    for (int count = 1; count <= all.num_micro_batches; ++count) {
      SCOPED_TRACE(kind + ", " + std::to_string(count));
      const Schedule fewer = with_fewer(all, count);
      EXPECT_TRUE(violations(fewer).empty());
      const Program program = lower(fewer, Publish::early, {}, 2, &all);
      EXPECT_NO_THROW(dry_run(program));
      EXPECT_EQ(static_cast<int>(program.reductions.size()), all.num_stages);
      for (const Reduction& reduction : program.reductions) EXPECT_EQ(reduction.ranks, holders(all, reduction.stage));
    }
    EXPECT_EQ(with_fewer(all, 10), all);
    EXPECT_THROW(with_fewer(all, 11), InvalidArgument);
  }
  for (const std::string& kind : schedule_kinds())
    for (int count = 1; count <= 12; ++count)
      EXPECT_NO_THROW(make_schedule({kind, 4, supported_micro_batches({kind, 4, count})})) << kind << count;
}

TEST(Reductions, AreThoseOfTheStagesThatSeveralRanksHold) {
  const auto count = [](const std::string& kind, int num_replicas) {
    return with_sums(make_schedule({kind, 4, 8}), num_replicas).reductions.size();
  };
  EXPECT_EQ(count("dualpipe", 0), 0u);
  EXPECT_EQ(count("dualpipe", 1), 4u);
  EXPECT_EQ(count("dualpipe", 3), 4u);
  for (const std::string kind : {"dualpipev", "interleaved", "zbv"}) {
    EXPECT_EQ(count(kind, 1), 0u) << kind;
    EXPECT_EQ(count(kind, 2), 8u) << kind;
  }
  for (const std::string kind : {"1f1b", "zb1p", "gpipe"}) {
    EXPECT_EQ(count(kind, 1), 0u) << kind;
    EXPECT_EQ(count(kind, 2), 4u) << kind;
  }
  EXPECT_TRUE(with_sums(forward_only(make_schedule({"dualpipe", 4, 8}), 8), 2).reductions.empty());
  for (const Reduction& reduction : with_sums(make_schedule({"dualpipe", 8, 20}), 2).reductions)
    EXPECT_THAT(reduction.ranks, ElementsAre(std::min(reduction.stage, 7 - reduction.stage),
                                             std::max(reduction.stage, 7 - reduction.stage)));
}

TEST(Reductions, OfAPipelineComeFromItsLastStageToItsFirst) {
  for (const std::string kind : {"1f1b", "gpipe"})
    EXPECT_THAT(stages_of_sums(with_sums(make_schedule({kind, 4, 8}), 2)), ElementsAre(3, 2, 1, 0)) << kind;
  // DualPipe: both ends of the pipeline are the last to end.
  EXPECT_THAT(stages_of_sums(with_sums(make_schedule({"dualpipe", 8, 20}), 1)), ElementsAre(7, 6, 5, 4, 3, 2, 1, 0));
}

TEST(Reductions, AreReadyWhenTheLastWeightPartOfTheirStageHasRun) {
  for_each_schedule(8, [](const Schedule& schedule) {
    const Simulation run = simulate(schedule, kOrdering);
    std::map<int, double> ready;
    for (const Interval& interval : run.timeline.intervals)
      for (const Op& op : reference::ops_of(interval.step))
        if (interval.lane == Lane::compute && has_weight_part(op, op.stage))
          ready[op.stage] = std::max(ready[op.stage], interval.end);
    const Program program = with_sums(schedule, 2);
    EXPECT_EQ(program.reductions.size(), ready.size());
    double before = 0;
    for (const Reduction& reduction : program.reductions) {
      const double time = ready.at(reduction.stage);
      EXPECT_GE(time, before);
      before = time;
      EXPECT_EQ(reduction.behind, std::count_if(run.transfers.begin(), run.transfers.end(),
                                                [&](const TimedTransfer& transfer) { return transfer.ready <= time; }));
    }
  });
}

TEST(Reductions, EachRankBeginsItsOwnOnceBehindItsLastWeightPart) {
  for_each_schedule(8, [](const Schedule& schedule) {
    const Program program = with_sums(schedule, 2);
    EXPECT_EQ(program.order, lower(schedule).order);
    for (int rank = 0; rank < static_cast<int>(program.ranks.size()); ++rank) {
      std::vector<int> begun;
      std::vector<Step> steps;
      for (const Instruction& instruction : program.ranks[rank]) {
        if (instruction.what == Do::reduce) begun.push_back(instruction.transfer);
        if (instruction.what != Do::compute) continue;
        steps.push_back(instruction.step);
        for (const Op& op : reference::ops_of(instruction.step))
          for (const int sum : begun) EXPECT_FALSE(has_weight_part(op, program.reductions[sum].stage));
      }
      EXPECT_EQ(steps, schedule.ranks[rank]);
      std::vector<int> expected;
      for (int sum = 0; sum < static_cast<int>(program.reductions.size()); ++sum) {
        const std::vector<int>& ranks = program.reductions[sum].ranks;
        if (std::find(ranks.begin(), ranks.end(), rank) != ranks.end()) expected.push_back(sum);
      }
      EXPECT_EQ(begun, expected);
    }
  });
}

TEST(Reductions, EveryProgramRunsWithOneOperationAtATime) {
  for_each_schedule(16, [](const Schedule& schedule) {
    for (const Publish publish : {Publish::early, Publish::atomic})
      for (const int num_replicas : {1, 2}) EXPECT_NO_THROW(dry_run(with_sums(schedule, num_replicas, publish)));
  });
  dry_run(with_sums(make_schedule({"dualpipe", 64, 512}), 2));
}

/// All replicas of a pipeline as one program of more ranks, with a sum for each stage over all of them.
Program side_by_side(const Program& one, int num_replicas) {
  const int num_ranks = static_cast<int>(one.ranks.size()), num_transfers = static_cast<int>(one.order.size());
  int num_micro_batches = 0;
  for (const auto& rank : one.ranks)
    for (const Instruction& instruction : rank)
      num_micro_batches = std::max(num_micro_batches, instruction.step.op.micro_batch + 1);
  Program all;
  for (const Transfer& transfer : one.order)
    for (int replica = 0; replica < num_replicas; ++replica) {
      Transfer moved = transfer;
      moved.micro_batch += replica * num_micro_batches;
      moved.from += replica * num_ranks;
      moved.to += replica * num_ranks;
      all.order.push_back(moved);
    }
  for (const Reduction& reduction : one.reductions) {
    Reduction wide{reduction.stage, {}, reduction.behind * num_replicas};
    for (int replica = 0; replica < num_replicas; ++replica)
      for (const int rank : reduction.ranks) wide.ranks.push_back(rank + replica * num_ranks);
    all.reductions.push_back(wide);
  }
  for (int replica = 0; replica < num_replicas; ++replica)
    for (const auto& rank : one.ranks) {
      auto& moved = all.ranks.emplace_back(rank);
      for (Instruction& instruction : moved) {
        if (instruction.what == Do::compute) {
          instruction.step.op.micro_batch += replica * num_micro_batches;
          if (instruction.step.overlapped) instruction.step.overlapped->micro_batch += replica * num_micro_batches;
        } else if (instruction.what != Do::reduce) {
          instruction.transfer = instruction.transfer * num_replicas + replica;
        }
      }
    }
  EXPECT_EQ(all.order.size(), static_cast<std::size_t>(num_transfers) * static_cast<std::size_t>(num_replicas));
  return all;
}

TEST(Reductions, AllReplicasTogetherRunWithOneOperationAtATime) {
  for_each_schedule(8, [](const Schedule& schedule) {
    for (const int num_replicas : {2, 3})
      EXPECT_NO_THROW(dry_run(side_by_side(with_sums(schedule, num_replicas), num_replicas)));
  });
}

TEST(Reductions, LieUnderTheCoolDown) {
  // Steps that both ranks of a sum still run when they have begun it: all but the weight parts of stages 0 to 3, which
  // end the picture of 8 x 20, are complete before.
  const Program program = with_sums(make_schedule({"dualpipe", 8, 20}), 1);
  std::map<int, int> fewest;  // by stage
  for (const auto& rank : program.ranks)
    for (std::size_t i = 0; i < rank.size(); ++i) {
      if (rank[i].what != Do::reduce) continue;
      const auto behind =
          static_cast<int>(std::count_if(rank.begin() + static_cast<std::ptrdiff_t>(i), rank.end(),
                                         [](const Instruction& each) { return each.what == Do::compute; }));
      const auto found = fewest.try_emplace(program.reductions[rank[i].transfer].stage, behind).first;
      found->second = std::min(found->second, behind);
    }
  EXPECT_EQ(fewest, (std::map<int, int>{{0, 0}, {1, 0}, {2, 0}, {3, 0}, {4, 1}, {5, 2}, {6, 5}, {7, 8}}));
}

TEST(Reductions, ADryRunCatchesWhatIsWrongWithThem) {
  const Program program = with_sums(make_schedule({"dualpipe", 4, 6}), 1);
  constexpr unsigned seed = 5;
  std::mt19937 random(seed);
  SCOPED_TRACE(detail::str("seed ", seed));
  for (std::size_t rank = 0; rank < program.ranks.size(); ++rank)
    for (std::size_t i = 0; i < program.ranks[rank].size(); ++i) {
      if (program.ranks[rank][i].what != Do::reduce) continue;
      Program lost = program, repeated = program;
      const auto at = static_cast<std::ptrdiff_t>(i);
      lost.ranks[rank].erase(lost.ranks[rank].begin() + at);
      repeated.ranks[rank].insert(repeated.ranks[rank].begin() + at, program.ranks[rank][i]);
      EXPECT_THROW(dry_run(lost), InvalidArgument) << rank << " " << i;
      EXPECT_THROW(dry_run(repeated), InvalidArgument) << rank << " " << i;
      // Before another operation of the order that comes before it.
      std::size_t other = i;
      while (other > 0 && !is_transfer(program.ranks[rank][other]) &&
             (other == i || program.ranks[rank][other].what != Do::reduce))
        --other;
      Program swapped = program;
      std::swap(swapped.ranks[rank][i], swapped.ranks[rank][other]);
      EXPECT_THROW(dry_run(swapped), InvalidArgument) << rank << " " << i;
    }
  const auto changed = [&](const auto& change) {
    return [&program, change] {
      Program mutant = program;
      change(mutant);
      dry_run(mutant);
    };
  };
  EXPECT_THAT(changed([](Program& p) {
                const auto sum = std::find_if(p.ranks[0].begin(), p.ranks[0].end(),
                                              [](const Instruction& each) { return each.what == Do::reduce; });
                const Instruction early = *sum;
                p.ranks[0].erase(sum);
                p.ranks[0].insert(p.ranks[0].begin(), early);
              }),
              ThrowsMessage<InvalidArgument>(HasSubstr("rank 0 at instruction 0 of")));
  EXPECT_THAT(changed([](Program& p) { p.reductions.push_back({0, {0, 3}, 0}); }),
              ThrowsMessage<InvalidArgument>(HasSubstr("not before the sum in front of it")));
  EXPECT_THAT(changed([](Program& p) { p.reductions.push_back({0, {0, 3}, static_cast<int>(p.order.size())}); }),
              ThrowsMessage<InvalidArgument>(HasSubstr("sum 4, of the gradients of stage 0: is never begun")));
  EXPECT_THAT(changed([](Program& p) { p.reductions[0].ranks = {0}; }),
              ThrowsMessage<InvalidArgument>(HasSubstr("this rank does not hold the stage")));
  EXPECT_THAT(changed([](Program& p) { p.reductions[0].ranks = {3, 0}; }),
              ThrowsMessage<InvalidArgument>(HasSubstr("expected ascending ranks below 4")));
  EXPECT_THAT(changed([](Program& p) { p.reductions[0].stage = 4; }),
              ThrowsMessage<InvalidArgument>(HasSubstr("the program computes 4 stages")));
  EXPECT_THAT(changed([](Program& p) { p.ranks[1].push_back({Do::reduce, 9, {}}); }),
              ThrowsMessage<InvalidArgument>(HasSubstr("reduce sum 9 of 4")));
}

}  // namespace
}  // namespace dualpipe
