#include "dualpipe/schedule/simulate.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "reference.hpp"

namespace dualpipe {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

double makespan(const Schedule& schedule, const Costs& costs, Publish publish) {
  return planner::report(simulate(schedule, costs, publish).timeline).makespan;
}

double worst_bubble(const planner::Report& report) {
  double worst = 0;
  for (const planner::RankReport& rank : report.ranks) worst = std::max(worst, rank.bubble);
  return worst;
}

int peak_activations(const Schedule& schedule) {
  int peak = 0;
  for (const planner::RankReport& rank : planner::report(simulate(schedule).timeline).ranks)
    peak = std::max(peak, rank.peak_activations);
  return peak;
}

// Modelled with an independent program.
TEST(Simulate, PublishedNumbers) {
  struct Row {
    int ranks, micro_batches;
    double send, atomic, early;
  };
  for (const Row& row : {Row{8, 20, 0, 66, 63}, Row{8, 20, 0.1, 68.6, 64.5}, Row{8, 20, 0.2, 71.2, 66},
                         Row{16, 64, 0, 206, 199}, Row{16, 64, 0.1, 214.1, 202.5}}) {
    const Schedule schedule = make_schedule({"dualpipe", row.ranks, row.micro_batches});
    EXPECT_NEAR(makespan(schedule, {.send = row.send}, Publish::atomic), row.atomic, 1e-9);
    EXPECT_NEAR(makespan(schedule, {.send = row.send}, Publish::early), row.early, 1e-9);
  }
}

TEST(Simulate, ClosedFormsHoldForManySizes) {
  for (int ranks = 2; ranks <= 16; ranks += 2)
    for (const int micro_batches : {2 * ranks, 2 * ranks + 2, 3 * ranks, 5 * ranks})
      for (const double weight : {0.5, 0.75, 1.0})
        for (const double saved : {0.0, 0.1, 0.3}) {  // by overlapping, of F + B
          SCOPED_TRACE(detail::str(ranks, " ranks, ", micro_batches, " micro-batches, W ", weight, ", saved ", saved));
          const Schedule schedule = make_schedule({"dualpipe", ranks, micro_batches});
          // F = B - W >= W and no loss by overlapping: there the published bubble is exact.
          const Costs costs{.forward = 1, .backward = 1 + weight, .weight = weight, .pair = (2 + weight) * (1 - saved)};
          const planner::Report atomic = planner::report(simulate(schedule, costs, Publish::atomic).timeline);
          EXPECT_NEAR(worst_bubble(atomic), (ranks / 2 - 1) * (costs.pair + costs.backward - 3 * costs.weight), 1e-9);
        }
}

TEST(Simulate, EarlyPublicationReachesTheLowerBound) {
  for (int ranks = 2; ranks <= 16; ranks += 2)
    for (const int micro_batches : {2 * ranks, 2 * ranks + 2, 3 * ranks, 5 * ranks}) {
      SCOPED_TRACE(detail::str(ranks, " ranks, ", micro_batches, " micro-batches"));
      const Schedule schedule = make_schedule({"dualpipe", ranks, micro_batches});
      EXPECT_NEAR(makespan(schedule, {}, Publish::early), micro_batches * 3 + (ranks / 2 - 1), 1e-9);
    }
}

TEST(Simulate, AtomicAgreesWithTheReferenceForEveryKind) {
  std::mt19937 random(20240917);
  std::uniform_real_distribution<double> cost(0.2, 2.0);
  for (const std::string& kind : schedule_kinds())
    for (int trial = 0; trial < 20; ++trial) {
      const int ranks = 2 * (1 + trial % 4);
      const Schedule schedule = make_schedule({kind, ranks, 2 * ranks + 2 * (trial % 3) * ranks});
      const double forward = cost(random), weight = cost(random), backward = weight + cost(random);
      const double pair = std::max(weight, forward + backward - cost(random) / 2);
      SCOPED_TRACE(detail::str(kind, " seed 20240917 trial ", trial, " ranks ", ranks));
      const auto expected = reference::makespan(schedule, {forward, backward, weight, pair});
      ASSERT_TRUE(expected.has_value());
      const planner::Report result =
          planner::report(simulate(schedule, {.forward = forward, .backward = backward, .weight = weight, .pair = pair},
                                   Publish::atomic)
                              .timeline);
      EXPECT_NEAR(result.makespan, *expected, 1e-9);
      for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
        double busy = 0;
        for (const Step& step : schedule.ranks[rank])
          busy += reference::Costs{forward, backward, weight, pair}.of(step);
        EXPECT_NEAR(result.ranks[rank].busy, busy, 1e-9);
        EXPECT_NEAR(result.ranks[rank].bubble, *expected - busy, 1e-9);
      }
    }
}

TEST(Simulate, EarlyIsNeverLaterThanAtomic) {
  for (const std::string& kind : schedule_kinds()) {
    const Schedule schedule = make_schedule({kind, 4, 16});
    for (const double send : {0.0, 0.1, 0.7})
      EXPECT_LE(makespan(schedule, {.send = send}, Publish::early),
                makespan(schedule, {.send = send}, Publish::atomic) + 1e-9)
          << kind;
  }
}

TEST(Simulate, PeakActivationsDoNotDependOnMicroBatchesOrCosts) {
  for (int ranks = 2; ranks <= 16; ranks += 2)
    for (const int micro_batches : {2 * ranks, 4 * ranks}) {
      SCOPED_TRACE(detail::str(ranks, " ranks, ", micro_batches, " micro-batches"));
      EXPECT_EQ(peak_activations(make_schedule({"dualpipe", ranks, micro_batches})), ranks + 1);
      EXPECT_EQ(peak_activations(make_schedule({"dualpipev", ranks, micro_batches})), 2 * ranks + 1);
      EXPECT_EQ(peak_activations(make_schedule({"1f1b", ranks, micro_batches})), ranks);
      EXPECT_EQ(peak_activations(make_schedule({"gpipe", ranks, micro_batches})), micro_batches);
    }
  const Costs nothing{.forward = 0, .backward = 0, .weight = 0, .pair = 0};
  for (const planner::RankReport& rank :
       planner::report(simulate(make_schedule({"dualpipe", 8, 20}), nothing).timeline).ranks) {
    EXPECT_EQ(rank.peak_activations, 9);
    EXPECT_EQ(rank.bubble, 0);
  }
}

TEST(Simulate, HandWrittenTimes) {
  // Rank 0: stages 0 and 3, rank 1: stages 1 and 2, as V places them.
  const Schedule schedule = from_csv("0F0,3F0,3B0,0B0\n1F0,2F0,2I0,1B0,2W0\n");
  const Costs costs{.forward = 1, .backward = 3, .weight = 2, .pair = 9, .send = 0.5};
  const Simulation early = simulate(schedule, costs, Publish::early);
  std::map<std::string, std::pair<double, double>> at;
  for (const Interval& interval : early.timeline.intervals)
    if (interval.lane == Lane::compute) at[to_string(interval.step)] = {interval.begin, interval.end};
  using Span = std::pair<double, double>;
  EXPECT_EQ(at["0F0"], Span(0, 1));
  EXPECT_EQ(at["1F0"], Span(1.5, 2.5));
  EXPECT_EQ(at["2F0"], Span(2.5, 3.5));  // the turn stays on its rank
  EXPECT_EQ(at["3F0"], Span(4, 5));
  EXPECT_EQ(at["3B0"], Span(5, 8));
  EXPECT_EQ(at["2I0"], Span(6.5, 7.5));  // 3B0 publishes at 6
  EXPECT_EQ(at["1B0"], Span(7.5, 10.5));
  EXPECT_EQ(at["2W0"], Span(10.5, 12.5));
  EXPECT_EQ(at["0B0"], Span(9, 12));  // 1B0 publishes at 8.5

  ASSERT_EQ(early.transfers.size(), 4U);
  EXPECT_EQ(early.transfers[2].transfer, (Transfer{Payload::gradient, 3, 0, 0, 1}));
  EXPECT_EQ(early.transfers[2].ready, 6);
  EXPECT_EQ(early.transfers[2].arrival, 6.5);
  EXPECT_EQ(to_string(early.transfers[2].transfer), "3I0 from rank 0 to rank 1");

  std::vector<Interval> lanes;
  for (const Interval& interval : early.timeline.intervals)
    if (interval.lane != Lane::compute) lanes.push_back(interval);
  ASSERT_EQ(lanes.size(), 8U);
  EXPECT_EQ(lanes[4], (Interval{0, Lane::send, {{Pass::BackwardInput, 3, 0}, {}}, 6, 6.5}));
  EXPECT_EQ(lanes[5], (Interval{1, Lane::receive, {{Pass::BackwardInput, 3, 0}, {}}, 6, 6.5}));

  EXPECT_EQ(simulate(schedule, costs, Publish::atomic).transfers[2].ready, 8);
}

TEST(Simulate, APairPublishesBothBeforeItsWeightPart) {
  // The pair of rank 1 hands 1F1's output to rank 2 and 1B0's gradient to rank 0.
  const Schedule schedule = from_csv("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n2F0,2B0,2F1,2B1\n");
  const Simulation result = simulate(schedule, {.forward = 1, .backward = 2, .weight = 0.5, .pair = 2.5});
  double begin = -1;
  for (const Interval& interval : result.timeline.intervals)
    if (interval.step.overlapped) begin = interval.begin;
  EXPECT_EQ(begin, 4.5);  // 2B0 runs from 3 to 5
  for (const TimedTransfer& timed : result.transfers)
    if (timed.transfer.stage == 1 &&
        timed.transfer.micro_batch == (timed.transfer.payload == Payload::activation ? 1 : 0)) {
      EXPECT_EQ(timed.ready, 6.5) << to_string(timed.transfer);
    }
}

TEST(Simulate, APairWithAnInputPartCostsNoWeightPart) {
  const Schedule schedule = from_csv("0F0,(0F1;0I0)OVERLAP_F_B,0W0,0B1\n");
  EXPECT_EQ(makespan(schedule, {.forward = 1, .backward = 2, .weight = 0.5, .pair = 2.5}, Publish::early),
            1 + 2 + 0.5 + 2);
}

TEST(Simulate, TransfersComeAfterThoseThatTheyDependOnEvenWithoutCosts) {
  const Costs nothing{.forward = 0, .backward = 0, .weight = 0, .pair = 0};
  for (const std::string& kind : schedule_kinds()) {
    const Simulation result = simulate(make_schedule({kind, 4, 12}), nothing);
    std::map<std::tuple<Payload, int, int>, std::size_t> position;
    for (std::size_t i = 0; i < result.transfers.size(); ++i) {
      const Transfer& transfer = result.transfers[i].transfer;
      position[{transfer.payload, transfer.stage, transfer.micro_batch}] = i;
    }
    for (const auto& [key, at] : position) {
      const auto& [payload, stage, micro_batch] = key;
      const auto before = position.find({payload, payload == Payload::activation ? stage - 1 : stage + 1, micro_batch});
      if (before != position.end()) {
        EXPECT_LT(before->second, at) << kind;
      }
    }
  }
}

TEST(Simulate, TakesForwardOnlySchedules) {
  for (const std::string& kind : schedule_kinds()) {
    const Schedule schedule = forward_only(make_schedule({kind, 4, 12}), 5);
    const Simulation result = simulate(schedule);
    int forwards = 0;
    for (const Interval& interval : result.timeline.intervals) forwards += interval.step.op.pass == Pass::Forward;
    EXPECT_EQ(forwards, schedule.num_stages * 5) << kind;
    for (const TimedTransfer& timed : result.transfers) EXPECT_EQ(timed.transfer.payload, Payload::activation);
  }
}

TEST(Simulate, RefusesImpossibleCosts) {
  const Schedule schedule = make_schedule({"1f1b", 2, 4});
  const auto with = [&](const Costs& costs) { return [&schedule, costs] { simulate(schedule, costs); }; };
  EXPECT_THAT(with({.forward = -1}),
              ThrowsMessage<InvalidArgument>(HasSubstr("forward must be finite and not negative, got -1")));
  EXPECT_THAT(with({.send = std::numeric_limits<double>::quiet_NaN()}),
              ThrowsMessage<InvalidArgument>(HasSubstr("send")));
  EXPECT_THAT(with({.pair = std::numeric_limits<double>::infinity()}),
              ThrowsMessage<InvalidArgument>(HasSubstr("pair")));
  EXPECT_THAT(with({.backward = 1, .weight = 1.5}),
              ThrowsMessage<InvalidArgument>(HasSubstr("costs 1.5 and the backward only 1")));
  EXPECT_THAT(with({.pair = 0.5}), ThrowsMessage<InvalidArgument>(HasSubstr("the pair only 0.5")));
}

TEST(Simulate, RefusesSchedulesThatCannotRun) {
  const auto of = [](const char* csv) { return [csv] { simulate(from_csv(csv)); }; };
  EXPECT_THAT(
      of("0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0\n"),
      ThrowsMessage<InvalidArgument>(HasSubstr("rank 1 at step 1, 1F1, waits for the result of 0F1 from rank 0")));
  EXPECT_THAT(of("0F0,0F1,0B0\n1F0,1B0\n"),
              ThrowsMessage<InvalidArgument>(HasSubstr("3 forwards, but 2 stages with 2")));
  EXPECT_THAT(of("0F0,0F0,0B0\n1F1,1B0\n"), ThrowsMessage<InvalidArgument>(HasSubstr("forwards")));
  EXPECT_THAT(of("0B0,0F0\n"), ThrowsMessage<InvalidArgument>(HasSubstr("its forward is not before it on this rank")));
  EXPECT_THAT(of("0F0,0W0,0I0\n"),
              ThrowsMessage<InvalidArgument>(HasSubstr("its backward for the input is not before it")));
  EXPECT_THAT(of("0F0,0B0,0I0\n"), ThrowsMessage<InvalidArgument>(HasSubstr("has a backward at step 1 already")));
  EXPECT_THAT(of("0F0,0B0,1F0\n1B0\n"), ThrowsMessage<InvalidArgument>(HasSubstr("rank 1, step 0 (1B0)")));
  EXPECT_THAT([] { simulate(Schedule{}); }, ThrowsMessage<InvalidArgument>(HasSubstr("at least one stage")));
  // Numbers that would need tables of billions of entries.
  Schedule huge{.name = "huge", .num_stages = 2000000000, .num_micro_batches = 2000000000, .ranks = {{Step{}}}};
  EXPECT_THAT([&] { simulate(huge); }, ThrowsMessage<InvalidArgument>(HasSubstr("1 forwards")));
}

TEST(Simulate, PairsMayHaveTheirResultsElsewhere) {
  const Schedule schedule = from_csv("0F0,0F1,,(0F2;0B0)OVERLAP_F_B,0B1,0B2\n,1F0,1B0,1F1,1B1,1F2,1B2\n");
  const auto arrival = [&](const Costs& costs, Publish publish) {
    for (const TimedTransfer& timed : simulate(schedule, costs, publish).transfers)
      if (timed.transfer.payload == Payload::activation && timed.transfer.micro_batch == 2) return timed.ready;
    return -1.0;
  };
  // 1F0 ends at 2, 1B0 publishes at 3: the pair lasts from 3 to 6.
  EXPECT_EQ(arrival({}, Publish::early), 5);
  EXPECT_EQ(arrival({.ready = {.activation = 1}}, Publish::early), 6);
  EXPECT_EQ(arrival({.ready = {.activation = 0.25}}, Publish::early), 3.75);
  EXPECT_EQ(arrival({.ready = {.gradient = 0.25}}, Publish::early), 5);
  EXPECT_EQ(arrival({.ready = {.activation = 0.25}}, Publish::atomic), 7);
  for (const double wrong : {0.0, 1.5, std::numeric_limits<double>::quiet_NaN()})
    EXPECT_THAT([&] { arrival({.ready = {.activation = wrong}}, Publish::early); },
                ThrowsMessage<InvalidArgument>(HasSubstr("above 0 and up to 1")));

  // Pairs that give nothing before their end run as the published blocks do.
  const Schedule large = make_schedule({"dualpipe", 8, 20});
  EXPECT_EQ(makespan(large, {.ready = {1, 1}}, Publish::early), 66);
}

/// The rules once more, as times that are filled in until none is missing.
double brute_force(const Schedule& schedule, const Costs& costs, Publish publish) {
  std::vector<StageCosts> stages = costs.stages;
  stages.resize(static_cast<std::size_t>(schedule.num_stages), {costs.forward, costs.backward, costs.weight});
  const auto pair = [&](int forward, int backward) {
    double duration = costs.stages.empty() ? costs.pair
                                           : costs.pair / (costs.forward + costs.backward) *
                                                 (stages[forward].forward + stages[backward].backward);
    for (const PairCost& given : costs.pairs)
      if (given.forward == forward && given.backward == backward) duration = given.duration;
    return duration;
  };
  const auto send = [&](int boundary, int from, int to) {
    double duration = costs.send;
    for (const SendCost& given : costs.sends) {
      const bool here = given.boundary == -1 || given.boundary == boundary;
      const bool us = given.rank_a == -1 || (given.rank_a == from && given.rank_b == to) ||
                      (given.rank_a == to && given.rank_b == from);
      if (here && us) duration = given.duration;
    }
    return duration;
  };

  std::map<std::tuple<char, int, int>, double> early, late;  // by F or I, stage, micro-batch: published, step's end
  std::vector<std::size_t> next(schedule.ranks.size(), 0);
  std::vector<double> clock(schedule.ranks.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
      if (next[rank] == schedule.ranks[rank].size()) continue;
      const Step& step = schedule.ranks[rank][next[rank]];
      double begin = clock[rank];
      bool ready = true;
      for (const Op& op : reference::ops_of(step)) {
        if (op.pass == Pass::BackwardWeight) continue;
        const bool forward = op.pass == Pass::Forward;
        const int from_stage = forward ? op.stage - 1 : op.stage + 1;
        if (from_stage < 0 || from_stage == schedule.num_stages) continue;
        const std::tuple key(forward ? 'F' : 'I', from_stage, op.micro_batch);
        if (!early.contains(key)) {
          ready = false;
          break;
        }
        const int from = rank_of(schedule, from_stage, op.micro_batch), to = static_cast<int>(rank);
        begin = std::max(begin, from == to ? late[key] : early[key] + send(std::min(from_stage, op.stage), from, to));
      }
      if (!ready) continue;
      double duration = 0, weight = 0;
      const StageCosts& own = stages[step.op.stage];
      if (step.overlapped) {
        const double its_weight = stages[step.overlapped->stage].weight;
        duration = pair(step.op.stage, step.overlapped->stage);
        if (step.overlapped->pass == Pass::Backward)
          weight = its_weight;
        else
          duration -= its_weight;
      } else if (step.op.pass == Pass::Forward) {
        duration = own.forward;
      } else if (step.op.pass == Pass::Backward) {
        duration = own.backward;
        weight = own.weight;
      } else {
        duration = step.op.pass == Pass::BackwardWeight ? own.weight : own.backward - own.weight;
      }
      const double slow = rank < costs.slowdown.size() ? costs.slowdown[rank] : 1;
      clock[rank] = begin + slow * duration;
      for (const Op& op : reference::ops_of(step)) {
        const std::tuple key(op.pass == Pass::Forward ? 'F' : 'I', op.stage, op.micro_batch);
        if (op.pass == Pass::BackwardWeight) continue;
        const double fraction = op.pass == Pass::Forward ? costs.ready.activation : costs.ready.gradient;
        double after = duration;
        if (publish == Publish::early)
          after = step.overlapped && fraction > 0 ? fraction * duration : duration - weight;
        early[key] = begin + slow * after;
        late[key] = clock[rank];
      }
      ++next[rank];
      moved = true;
    }
  }
  return *std::max_element(clock.begin(), clock.end());
}

TEST(Simulate, UnevenCostsAgreeWithBruteForce) {
  std::mt19937 random(42);
  std::uniform_real_distribution<double> cost(0.3, 2);
  const auto chance = [&] { return cost(random) < 1; };
  for (const std::string& kind : schedule_kinds())
    for (int trial = 0; trial < 20; ++trial) {
      const int ranks = 2 * (1 + trial % 4);
      const Schedule schedule = make_schedule({kind, ranks, 2 * ranks + 2 * (trial % 3) * ranks});
      Costs costs{.send = cost(random) / 10};
      if (chance()) costs.ready = {cost(random) / 2, cost(random) / 2};
      if (trial % 5 > 0)
        for (int stage = 0; stage < schedule.num_stages; ++stage) {
          const double weight = cost(random);
          costs.stages.push_back({cost(random), weight + cost(random), weight});
        }
      for (int i = 0; i < trial % 4; ++i) {
        const auto stage = [&] { return static_cast<int>(random() % static_cast<unsigned>(schedule.num_stages)); };
        const auto rank = [&] { return static_cast<int>(random() % static_cast<unsigned>(ranks)); };
        const int a = rank();
        const int b = (a + 1) % ranks;
        if (chance()) costs.sends.push_back({.rank_a = a, .rank_b = b, .duration = cost(random)});
        if (schedule.num_stages > 1)
          costs.sends.push_back({.boundary = stage() % (schedule.num_stages - 1), .duration = cost(random)});
        costs.slowdown.resize(static_cast<std::size_t>(ranks), 1);
        costs.slowdown[a] = cost(random);
        const int forward = stage(), backward = stage();
        if (std::none_of(costs.pairs.begin(), costs.pairs.end(),
                         [&](const PairCost& pair) { return pair.forward == forward && pair.backward == backward; }))
          costs.pairs.push_back({forward, backward, 3 + cost(random)});
      }
      for (const Publish publish : {Publish::early, Publish::atomic}) {
        SCOPED_TRACE(detail::str(kind, ", seed 42, trial ", trial, publish == Publish::early ? ", early" : ", atomic"));
        const double expected = brute_force(schedule, costs, publish);
        EXPECT_NEAR(simulate_makespan(schedule, costs, publish), expected, 1e-9 * expected);
        EXPECT_NEAR(makespan(schedule, costs, publish), expected, 1e-9 * expected);
      }
    }
}

TEST(Simulate, AStragglerDecidesHowLongItTakes) {
  // GPipe on ranks that hand over at once: the slowest rank works through all of its micro-batches, the others once
  // before and once after it.
  const Schedule schedule = make_schedule({"gpipe", 4, 10});
  for (const double slow : {1.0, 1.5, 4.0})
    for (std::size_t rank = 0; rank < 4; ++rank) {
      Costs costs;
      costs.slowdown.resize(4, 1);
      costs.slowdown[rank] = slow;
      EXPECT_NEAR(makespan(schedule, costs, Publish::atomic), 10 * 3 * slow + 3 * 3, 1e-9) << rank;
    }
}

TEST(Simulate, ASlowLinkDelaysWhatCrossesIt) {
  // One micro-batch there and back over three boundaries, of which the second costs 5 and the third, between the ranks
  // 2 and 3, 0.5.
  const Schedule schedule = make_schedule({"gpipe", 4, 1});
  const Costs costs{.send = 0.25,
                    .sends = {{.boundary = 1, .duration = 5}, {.rank_a = 3, .rank_b = 2, .duration = 0.5}}};
  EXPECT_NEAR(makespan(schedule, costs, Publish::atomic), 4 * 3 + 2 * (0.25 + 5 + 0.5), 1e-9);
  const Simulation result = simulate(schedule, costs);
  EXPECT_NEAR(result.transfers[1].arrival - result.transfers[1].ready, 5, 1e-9);
}

TEST(Simulate, IsLinearInTheNumberOfOps) {
  const Schedule schedule = make_schedule({"dualpipe", 128, 2048});
  EXPECT_NEAR(makespan(schedule, {}, Publish::early), 2048 * 3 + 63,
              1e-6);  // CTest's time limit ends what is not linear
}

}  // namespace
}  // namespace dualpipe
