// What schedules cost: uneven costs and their check, files, memory, spreading, and costs measured from a trace.
#include "dualpipe/schedule/costs.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/cost_file.hpp"
#include "dualpipe/planner/cost_model.hpp"
#include "dualpipe/planner/memory.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/planner/trace.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "schedule/reference.hpp"

namespace dualpipe::planner {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::ThrowsMessage;

constexpr double infinity = std::numeric_limits<double>::infinity();

void expect_refused(const std::function<void()>& call, const std::string& message) {
  EXPECT_THAT(call, ThrowsMessage<InvalidArgument>(HasSubstr(message)));
}

TEST(Costs, CheckNamesTheValue) {
  const auto refused = [](const Costs& costs, const std::string& message) {
    expect_refused([&] { check(costs, 2, 4); }, message);
  };
  const std::vector<StageCosts> even(4);
  auto stages = even;
  stages[2].forward = -1;
  refused({.stages = stages}, "forward of stage 2 must be finite and not negative, got -1");
  stages = even;
  stages[3].weight = 2.5;
  refused({.stages = stages}, "it costs 2.5 and the backward only 2 of stage 3");
  refused({.stages = std::vector<StageCosts>(3)}, "costs of 3 stages, but the schedule has 4");
  refused({.forward = 1e308, .backward = 1e308}, "together must be finite and not negative, got inf");
  refused({.pairs = {{4, 0, 1}}}, "a pair of stages 4 (forward) and 0: stage 4, but the schedule has 4");
  refused({.pairs = {{0, 1, std::nan("")}}}, "got nan");
  refused({.sends = {{.boundary = 3, .duration = 1}}}, "boundary 3, but the schedule has 3 of them");
  refused({.sends = {{.boundary = 0, .duration = -infinity}}}, "over boundary 0");
  refused({.sends = {{.rank_a = 0, .rank_b = 2, .duration = 1}}}, "rank 2, but the schedule has 2");
  refused({.sends = {{.rank_a = 1, .duration = 1}}}, "rank -1");
  refused({.sends = {{.rank_a = 1, .rank_b = 1, .duration = 1}}}, "nothing is sent within a rank");
  refused({.slowdown = {1, 0}}, "the slowdown of rank 1 must be a positive factor, got 0");
  refused({.slowdown = {1, 1, 2}}, "a slowdown of rank 2, but there are 2 ranks");
  refused({.seconds_per_unit = infinity}, "seconds_per_unit");
  EXPECT_NO_THROW(dualpipe::check({.send = -0.0, .stages = even, .slowdown = {2}}, 2, 4));
}

TEST(Costs, SumsBeyondADoubleAreRefused) {
  const Schedule schedule = make_schedule({"1f1b", 2, 4});
  const auto costs = [](double huge) { return Costs{huge, 2 * huge, huge, 3 * huge}; };
  EXPECT_LT(simulate_makespan(schedule, costs(1e306)), infinity);
  expect_refused([&] { simulate(schedule, costs(4e307)); }, "add up to inf");
  expect_refused([&] { simulate_makespan(schedule, costs(4e307)); }, "add up to inf");
}

TEST(Memory, CountsWhatTheReferenceCounts) {
  for (const std::string& kind : schedule_kinds())
    for (const int ranks : {2, 4, 6})
      for (const int micro_batches : {2 * ranks, 5 * ranks}) {
        SCOPED_TRACE(detail::str(kind, " ", ranks, " x ", micro_batches));
        const Schedule schedule = make_schedule({kind, ranks, micro_batches});
        const std::vector<RankMemory> found = memory(schedule, {1, 0, 0, {}});
        const std::vector<RankMemory> weights = memory(schedule, {0, 1, 0, {}});
        const std::vector<RankMemory> states = memory(schedule, {0, 0, 3, {}});
        ASSERT_EQ(found.size(), schedule.ranks.size());
        for (int rank = 0; rank < ranks; ++rank) {
          const reference::Peaks expected = reference::peaks(schedule.ranks[rank]);
          EXPECT_EQ(found[rank].peak_activations, expected.activations);
          EXPECT_EQ(found[rank].peak_weights, expected.queued_weights);
          EXPECT_EQ(found[rank].peak, expected.activations);
          EXPECT_EQ(weights[rank].peak, expected.queued_weights);
          EXPECT_EQ(states[rank].peak, 3.0 * static_cast<double>(stages_of(schedule, rank).size()));
        }
      }
}

TEST(Memory, AddsWhatStagesHold) {
  // Rank 0 holds stages 0 and 2. It holds most at 2F1: both stages, 0F0, 0F1, 2F1, and the weight part of 2I0.
  const Schedule schedule = from_csv("0F0,2F0,2I0,0F1,2F1,2W0,0B0,2B1,0B1\n1F0,1F1,1B0,1B1\n");
  const MemoryCosts costs{.stages = {{1, 0, 5}, {2, 0, 6}, {3, 0.5, 7}}};
  const std::vector<RankMemory> found = memory(schedule, costs);
  EXPECT_EQ(found[0].state, 5 + 7);
  EXPECT_EQ(found[0].peak, 5 + 7 + 1 + 1 + 3 + 0.5);
  EXPECT_EQ(found[0].peak_activations, 3);
  EXPECT_EQ(found[0].peak_weights, 1);
  EXPECT_EQ(found[1].peak, 6 + 2 * 2);
  expect_refused([&] { memory(schedule, {.stages = {{}, {}}}); }, "memory of 2 stages, but the schedule has 3");
  expect_refused([&] { memory(schedule, {.state = -2}); }, "got -2");
  expect_refused([&] { memory(schedule, {.stages = {{}, {.weight = infinity}, {}}}); }, "of stage 1");
}

TEST(Memory, OfStagesThatAreComputedAgain) {
  // GPipe on two ranks: all forwards first, and each holds its activation while it runs.
  const Schedule gpipe = make_schedule({"gpipe", 2, 6});
  EXPECT_EQ(memory(gpipe, {.activation = 10, .state = 3})[0].peak, 63);
  EXPECT_EQ(memory(gpipe, {.activation = 10, .state = 3, .kept = 1})[0].peak, 3 + 5 * 1 + 10);
  EXPECT_EQ(memory(gpipe, {.activation = 10, .kept = 10})[0].peak, memory(gpipe, {.activation = 10})[0].peak);
  // In a pair the activation of its forward and the one that is computed again count.
  const Schedule dualpipe = make_schedule({"dualpipe", 4, 8});
  for (const RankMemory& rank : memory(dualpipe, {.activation = 10, .kept = 0})) EXPECT_EQ(rank.peak, 20);
  expect_refused([&] { memory(gpipe, {.kept = -1}); },
                 "what stays of an activation must be finite and not negative, got -1");
  expect_refused([&] { memory(gpipe, {.kept = 2}); }, "2 cannot stay of an activation, which takes 1");
  expect_refused([&] { memory(gpipe, {.stages = {{3}, {1}}, .kept = 2}); },
                 "of an activation of stage 1, which takes 1");
}

TEST(Spread, ModelsThatAreComputedAgain) {
  const CostModel model{.time = {.forward = 1, .backward = 2, .weight = 1, .pair = 2.5, .pairs = {{0, 1, 4}}},
                        .memory = {.activation = 4}};
  const CostModel again = recomputed(model, 0.5);
  EXPECT_EQ(again.time.backward, 3);
  EXPECT_EQ(again.time.weight, 1);
  EXPECT_EQ(again.time.pair, 3.5);
  EXPECT_EQ(again.time.pairs[0].duration, 5);
  const CostModel finer = spread(again, 2, 4);
  EXPECT_EQ(finer.memory.activation, 2);
  EXPECT_EQ(finer.memory.kept, 0.5);  // a boundary is as large as before
  CostModel uneven = model;
  uneven.time.stages = {{1, 2, 1}, {2, 4, 2}};
  uneven = recomputed(uneven, 0);
  EXPECT_EQ(uneven.time.stages[1].backward, 6);
  EXPECT_EQ(uneven.time.pairs[0].duration, 6);
}

TEST(Memory, AShardedOptimizerIsSpreadOverHoldersAndReplicas) {
  // 18 bytes a parameter, of which 12 are the optimizer's; S = 1 / P of the parameters.
  for (const int replicas : {1, 2, 5}) {
    const auto of_ranks = [&](const std::string& kind) {
      const Schedule schedule = make_schedule({kind, 4, 8});
      const double stage = 18.0 * static_cast<double>(schedule.ranks.size()) / schedule.num_stages;
      return memory(schedule, {.activation = 0, .state = stage, .sharded = 12.0 / 18, .replicas = replicas});
    };
    for (const RankMemory& rank : of_ranks("dualpipe")) EXPECT_NEAR(rank.state, 12 + 12.0 / replicas, 1e-12);
    for (const std::string kind : {"dualpipev", "1f1b", "interleaved"})
      for (const RankMemory& rank : of_ranks(kind)) EXPECT_NEAR(rank.state, 6 + 12.0 / replicas, 1e-12) << kind;
  }
  const Schedule schedule = make_schedule({"dualpipe", 2, 4});
  const std::vector<RankMemory> uneven =
      memory(schedule, {.activation = 0, .stages = {{0, 0, 4}, {0, 0, 8}}, .sharded = 0.5, .replicas = 2});
  EXPECT_DOUBLE_EQ(uneven[0].state, 12 * (0.5 + 0.5 / 4));
  expect_refused([&] { memory(schedule, {.sharded = 1.5}); }, "must be 0 to 1, got 1.5");
  expect_refused([&] { memory(schedule, {.sharded = 0.5, .replicas = 0}); }, "at least one replica, got 0");
}

TEST(CostFile, ReadsEveryKey) {
  const CostModel model = read_costs(R"({
    "forward": 2, "backward": 4, "weight": 1.5, "pair": 5, "send": 0.1, "seconds_per_unit": 0.001,
    "pair_ready": {"activation": 0.75, "gradient": 0.5},
    "memory": {"activation": 3, "weight": 0.5, "state": 6},
    "stages": [{"forward": 2.5, "memory": {"state": 9}}, {}, {"backward": 6, "weight": 0}],
    "pairs": [{"forward": 0, "backward": 2, "duration": 7}],
    "sends": [{"boundary": 1, "duration": 0.2}, {"ranks": [1, 2], "duration": 0.5},
              {"boundary": 0, "ranks": [0, 1], "duration": 0}],
    "slowdown": [1, 1.25]})");
  const CostModel expected{
      .time = {.forward = 2,
               .backward = 4,
               .weight = 1.5,
               .pair = 5,
               .send = 0.1,
               .ready = {0.75, 0.5},
               .stages = {{2.5, 4, 1.5}, {2, 4, 1.5}, {2, 6, 0}},
               .pairs = {{0, 2, 7}},
               .sends = {{.boundary = 1, .duration = 0.2},
                         {.rank_a = 1, .rank_b = 2, .duration = 0.5},
                         {.boundary = 0, .rank_a = 0, .rank_b = 1, .duration = 0}},
               .slowdown = {1, 1.25},
               .seconds_per_unit = 0.001},
      .memory = {.activation = 3, .weight = 0.5, .state = 6, .stages = {{3, 0.5, 9}, {3, 0.5, 6}, {3, 0.5, 6}}}};
  EXPECT_EQ(model, expected);
  EXPECT_EQ(read_costs(to_json(model)), model);
}

TEST(CostFile, SizesOfStages) {
  const CostModel model = read_costs(R"({"stages": [{"parameters": 30, "bytes": 120}, {}, {"parameters": 6}]})");
  EXPECT_EQ(model.sizes, (std::vector<StageSize>{{30, 120}, {0, 0}, {6, 0}}));
  EXPECT_EQ(read_costs(to_json(model)), model);
  EXPECT_EQ(spread(model, 3, 6).sizes, (std::vector<StageSize>{{15, 60}, {15, 60}, {0, 0}, {0, 0}, {3, 0}, {3, 0}}));
  EXPECT_THAT(parameters_of_ranks(make_schedule({"dualpipev", 3, 6}), spread(model, 3, 6).sizes),
              testing::ElementsAre(18, 18, 0));  // stages 0 and 5, 1 and 4, 2 and 3
  EXPECT_TRUE(read_costs(R"({"stages": [{}, {}]})").sizes.empty());
  expect_refused([] { read_costs(R"({"stages": [{"parameters": -1}]})"); }, "\"parameters\" must be finite and not");
  expect_refused([&] { parameters_of_ranks(make_schedule({"1f1b", 2, 4}), model.sizes); }, "sizes of 3 stages");
}

TEST(CostFile, WhatIsAbsentFollowsFromTheRest) {
  EXPECT_EQ(read_costs("{}"), CostModel{});
  EXPECT_EQ(read_costs(R"({"forward": 3})").time, (Costs{.forward = 3, .backward = 6, .weight = 3, .pair = 9}));
  EXPECT_EQ(read_costs(R"({"backward": 3, "send": 0.5})").time, (Costs{1, 3, 1.5, 4, 0.5}));
}

TEST(CostFile, RefusesWithThePlace) {
  const auto refused = [](const std::string& text, const std::string& message) {
    expect_refused([&] { read_costs(text); }, message);
  };
  refused("", "not JSON");
  refused("{\"forward\": 1", "not JSON");
  refused("[]", "costs must be an object, got []");
  refused(R"({"foward": 1})", "costs: unknown key \"foward\"; known are forward, backward, ");
  refused(R"({"forward": 1, "forward": 2})", "the key \"forward\" is named twice");
  refused(R"({"forward": "1"})", "costs: \"forward\" must be a number, got \"1\"");
  refused(R"({"forward": -1})", "costs: \"forward\" must be finite and not negative, got -1");
  refused(R"({"forward": 0})", "costs: \"forward\" must take time, got 0");
  refused(R"({"backward": -0.0})", "costs: \"backward\" must take time");
  refused(R"({"pair": 0})", "costs: \"pair\" must take time");
  refused(R"({"send": 1e400})", "1e400");
  refused(R"({"forward": 1e308, "backward": 1e308})", "add up to inf");
  refused(R"({"send": NaN})", "not JSON");
  refused(R"({"send": null})", "must be a number, got null");
  refused(R"({"pair_ready": {"activation": -0.5}})", "got -0.5");
  refused(R"({"pair_ready": {"output": 0.5}})", "costs: \"pair_ready\": unknown key \"output\"");
  refused(R"({"memory": 3})", "costs: \"memory\" must be an object, got 3");
  refused(R"({"memory": {"state": -3}})", "costs: \"memory\": \"state\"");
  refused(R"({"stages": {}})", "costs: \"stages\" must be a list, got {}");
  refused(R"({"stages": [{}, {"backward": 0}]})", "costs: \"stages\"[1]: \"backward\" must take time, got 0");
  refused(R"({"stages": [{"memory": {"states": 1}}]})", "costs: \"stages\"[0]: \"memory\": unknown key \"states\"");
  refused(R"({"pairs": [{"forward": 0, "backward": 1}]})", "costs: \"pairs\"[0] lacks \"duration\"");
  refused(R"({"pairs": [{"forward": 0.5, "backward": 1, "duration": 1}]})", "a whole number from 0 on, got 0.5");
  refused(R"({"pairs": [{"forward": 99999999999, "backward": 1, "duration": 1}]})", "got 99999999999");
  refused(R"({"sends": [{"duration": 1}]})", "names neither a \"boundary\" nor two \"ranks\"");
  refused(R"({"sends": [{"ranks": [1], "duration": 1}]})", "must be two ranks, got [1]");
  refused(R"({"sends": [{"ranks": [1, -2], "duration": 1}]})", "got -2");
  refused(R"({"slowdown": [1, "slow"]})", "costs: \"slowdown\"[1] must be a number");
  refused(R"({"slowdown": [true]})", "got true");
  refused(std::string(100000, '['), "nested");
}

TEST(Spread, KeepsTheModel) {
  std::mt19937 random(7);
  std::uniform_real_distribution<double> cost(0.5, 2);
  for (const int described : {1, 3, 4, 8, 61})
    for (const int stages : {1, 2, 4, 8, 12, 16}) {
      SCOPED_TRACE(detail::str("seed 7, ", described, " stages over ", stages));
      CostModel model;
      double forward = 0, state = 0;
      for (int stage = 0; stage < described; ++stage) {
        const double weight = cost(random);
        model.time.stages.push_back({cost(random), weight + cost(random), weight});
        model.memory.stages.push_back({cost(random), cost(random), cost(random)});
        forward += model.time.stages.back().forward;
        state += model.memory.stages.back().state;
      }
      const CostModel result = spread(model, described, stages);
      ASSERT_EQ(result.time.stages.size(), static_cast<std::size_t>(stages));
      double new_forward = 0, new_state = 0;
      for (int stage = 0; stage < stages; ++stage) {
        new_forward += result.time.stages[stage].forward;
        new_state += result.memory.stages[stage].state;
      }
      EXPECT_NEAR(new_forward, forward, 1e-9);
      EXPECT_NEAR(new_state, state, 1e-9);
      EXPECT_NO_THROW(check(result.time, 1, stages));
    }
}

TEST(Spread, MovesBoundariesAndLinks) {
  CostModel model;
  model.time = {.forward = 1,
                .backward = 3,
                .weight = 2,
                .pair = 3,
                .send = 0.1,
                .stages = {{1, 3, 2}, {2, 3, 1}},
                .pairs = {{0, 1, 3}},
                .sends = {{.boundary = 0, .duration = 0.5},
                          {.boundary = 0, .rank_a = 0, .rank_b = 1, .duration = 0.2},
                          {.boundary = 0, .rank_a = 1, .rank_b = 0, .duration = 0.4}}};
  const CostModel four = spread(model, 2, 4);
  EXPECT_EQ(four.time.stages, (std::vector<StageCosts>{{0.5, 1.5, 1}, {0.5, 1.5, 1}, {1, 1.5, 0.5}, {1, 1.5, 0.5}}));
  EXPECT_EQ(four.time.pair / (four.time.forward + four.time.backward), 0.75);
  EXPECT_THAT(four.time.pairs, IsEmpty());
  ASSERT_EQ(four.time.sends.size(), 2U);
  EXPECT_EQ(four.time.sends[0], (SendCost{.boundary = 1, .duration = 0.5}));
  EXPECT_EQ(four.time.sends[1].rank_b, 1);
  EXPECT_DOUBLE_EQ(four.time.sends[1].duration, 0.3);
  // Three stages of two: the middle one has half of each, no boundary is left.
  const CostModel three = spread(model, 2, 3);
  EXPECT_DOUBLE_EQ(three.time.stages[1].forward, 1.0 / 3 + 2.0 / 3);
  EXPECT_EQ(three.time.sends.size(), 1U);
  EXPECT_EQ(spread(model, 2, 2), model);
  expect_refused([&] { spread(model, 3, 6); }, "costs of 2 stages, expected 3");
}

/// Uneven in every way that a trace can tell.
Costs uneven_costs(std::mt19937& random, int num_stages) {
  std::uniform_real_distribution<double> cost(0.5, 2);
  Costs costs;
  for (int stage = 0; stage < num_stages; ++stage) {
    const double weight = cost(random);
    costs.stages.push_back({cost(random), weight + cost(random), weight});
    if (stage + 1 < num_stages) costs.sends.push_back({.boundary = stage, .duration = cost(random) / 10});
  }
  for (int forward = 0; forward < num_stages; ++forward)
    for (int backward = 0; backward < num_stages; ++backward)
      costs.pairs.push_back(
          {forward, backward, costs.stages[forward].forward + costs.stages[backward].backward * cost(random) + 1});
  return costs;
}

TEST(MeasuredCosts, ComeBackExactlyFromAPlan) {
  std::mt19937 random(11);
  for (const std::string& kind : schedule_kinds()) {
    SCOPED_TRACE(kind + ", seed 11");
    const Schedule schedule = make_schedule({kind, 4, 12});
    const Costs costs = uneven_costs(random, schedule.num_stages);
    const MeasuredCosts measured = measure_costs(from_trace(to_trace(simulate(schedule, costs).timeline)));
    ASSERT_EQ(measured.costs.stages.size(), costs.stages.size());

    bool splits = false, pairs = false;
    for (const auto& steps : schedule.ranks)
      for (const Step& step : steps) {
        splits = splits || step.op.pass == Pass::BackwardWeight;
        pairs = pairs || step.overlapped;
      }
    EXPECT_EQ(pairs, !measured.costs.pairs.empty());
    for (int stage = 0; stage < schedule.num_stages; ++stage) {
      EXPECT_NEAR(measured.costs.stages[stage].forward, costs.stages[stage].forward, 1e-9);
      EXPECT_NEAR(measured.costs.stages[stage].backward, costs.stages[stage].backward, 1e-9);
    }
    for (const PairCost& pair : measured.costs.pairs)
      EXPECT_NEAR(pair.duration, costs.pairs[pair.forward * schedule.num_stages + pair.backward].duration, 1e-9);
    for (const SendCost& send : measured.costs.sends)
      EXPECT_NEAR(send.duration, costs.sends[send.boundary].duration, 1e-9);
    EXPECT_EQ(measured.costs.ready, PairReady{});
    // Where weight parts run by themselves they are known too, and then the run is predicted.
    if (splits) {
      EXPECT_NEAR(simulate_makespan(schedule, measured.costs), simulate_makespan(schedule, costs), 1e-6);
    } else {
      EXPECT_THAT(measured.notes, testing::Contains(HasSubstr("weight part of stages 0")));
    }
  }
}

TEST(MeasuredCosts, SlowLinksAndReadyFractions) {
  const Schedule schedule = make_schedule({"dualpipe", 8, 20});
  const Costs costs{.send = 0.1,
                    .ready = {0.5, 0.75},
                    .sends = {{.rank_a = 2, .rank_b = 3, .duration = 0.7}},
                    .seconds_per_unit = 0.01};
  const MeasuredCosts measured = measure_costs(simulate(schedule, costs).timeline);
  EXPECT_NEAR(measured.costs.ready.activation, 0.5, 1e-9);
  EXPECT_NEAR(measured.costs.ready.gradient, 0.75, 1e-9);
  EXPECT_EQ(measured.costs.seconds_per_unit, 0.01);
  for (const SendCost& send : measured.costs.sends)
    EXPECT_NEAR(send.duration, std::min(send.rank_a, send.rank_b) == 2 ? 0.7 : 0.1, 1e-9);
  EXPECT_NEAR(simulate_makespan(schedule, measured.costs), simulate_makespan(schedule, costs), 1e-6);
  EXPECT_NEAR(measured.costs.pair, 3, 1e-9);
  EXPECT_NEAR(measured.costs.send, 0.1, 1e-9);
}

TEST(MeasuredCosts, AReceiveThatWaitsIsNotSlow) {
  // The receive is posted at 0; the tensor leaves at 1 and is there at 1.25.
  Timeline timeline{.name = "", .num_ranks = 2, .seconds_per_unit = 1, .intervals = {}};
  const auto add = [&](int rank, Lane lane, const char* step, double begin, double end) {
    timeline.intervals.push_back({rank, lane, parse_step(step), begin, end});
  };
  add(0, Lane::compute, "0F0", 0, 1);
  add(0, Lane::send, "0F0", 1, 1.3);
  add(1, Lane::receive, "0F0", 0, 1.25);
  add(1, Lane::compute, "1F0", 1.25, 2.25);
  add(1, Lane::compute, "1B0", 2.25, 5.25);
  add(0, Lane::compute, "0B0", 5.25, 9.25);
  const MeasuredCosts measured = measure_costs(timeline);
  EXPECT_DOUBLE_EQ(measured.costs.send, 0.25);
  EXPECT_EQ(measured.costs.stages, (std::vector<StageCosts>{{1, 4, 2}, {1, 3, 1.5}}));
  EXPECT_EQ(measured.costs.pair, 1 + 3.5);
  EXPECT_THAT(measured.notes, ElementsAre(HasSubstr("weight part of stages 0, 1: none by itself in the trace, taken as "
                                                    "0.5 of the backward"),
                                          HasSubstr("pairs: none in the trace")));
}

TEST(MeasuredCosts, TheFirstOfSeveralStepsWarmsUp) {
  const Schedule schedule = make_schedule({"dualpipev", 2, 6});
  Timeline all = simulate(schedule, {.forward = 7, .backward = 20, .weight = 9, .pair = 27}).timeline;
  for (const double slow : {1.0, 1.5, 1.1}) {
    const double begin = extent(all).end + 1;
    for (Interval interval : simulate(schedule, {slow, 2 * slow, slow, 3 * slow}).timeline.intervals) {
      interval.begin += begin;
      interval.end += begin;
      all.intervals.push_back(interval);
    }
  }
  const MeasuredCosts measured = measure_costs(all);
  for (const StageCosts& stage : measured.costs.stages) {
    EXPECT_NEAR(stage.forward, 1.1, 1e-9);
    EXPECT_NEAR(stage.weight, 1.1, 1e-9);
  }
}

TEST(MeasuredCosts, PipelinesSideBySideCountTogether) {
  const Schedule schedule = make_schedule({"dualpipe", 4, 8});
  std::mt19937 random(17);
  const Costs costs = uneven_costs(random, 4);
  const Timeline alone = simulate(schedule, costs).timeline;
  // The second pipeline runs at another time, on the ranks behind the first or between them.
  for (const bool between : {false, true}) {
    Timeline both{.name = "", .num_ranks = 8, .seconds_per_unit = 0, .intervals = {}};
    for (const int pipeline : {0, 1})
      for (Interval interval : alone.intervals) {
        interval.rank = between ? 2 * interval.rank + pipeline : 4 * pipeline + interval.rank;
        interval.begin += 0.7 * pipeline;
        interval.end += 0.7 * pipeline;
        both.intervals.push_back(interval);
      }
    const MeasuredCosts measured = measure_costs(both);
    EXPECT_EQ(measured.costs.sends.size(), measure_costs(alone).costs.sends.size());
    for (const SendCost& send : measured.costs.sends)
      EXPECT_NEAR(send.duration, costs.sends[send.boundary].duration, 1e-9) << "seed 17";
    EXPECT_NEAR(simulate_makespan(schedule, measured.costs), simulate_makespan(schedule, costs), 1e-6) << "seed 17";
  }
}

TEST(MeasuredCosts, RefuseWhatIsNoTrainingStep) {
  expect_refused([] { measure_costs({}); }, "no steps");
  const Schedule training = make_schedule({"1f1b", 2, 4});
  expect_refused([&] { measure_costs(simulate(forward_only(training, 4)).timeline); }, "no backward outside of pairs");
  Timeline timeline = simulate(training).timeline;
  std::erase_if(timeline.intervals, [](const Interval& interval) { return interval.step.op.stage == 0; });
  expect_refused([&] { measure_costs(timeline); }, "no steps of stage 0");
}

}  // namespace
}  // namespace dualpipe::planner
