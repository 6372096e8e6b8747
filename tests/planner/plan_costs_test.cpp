// Costs and comparisons on the command line.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dualpipe/planner/jitter.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "plan_tool.hpp"

namespace dualpipe::planner {
namespace {

using nlohmann::json;
using testing::EndsWith;
using testing::HasSubstr;
using testing::StartsWith;

class PlanCosts : public PlanTool {
 protected:
  double makespan(const std::string& arguments) const {
    return PlanTool::makespan("--ranks 8 --microbatches 20 " + arguments);
  }
};

TEST_F(PlanCosts, UnevenCostsFromFlagsAndFromAFileAreTheSame) {
  Costs costs{.send = 0.1, .stages = std::vector<StageCosts>(8)};
  costs.stages[0] = {1.3, 2.6, 1.3};
  costs.stages[7] = {1.5, 3, 1.5};
  costs.sends = {{.boundary = 2, .duration = 0.3}, {.rank_a = 3, .rank_b = 4, .duration = 0.5}};
  costs.slowdown = {1, 1, 1.25};
  costs.ready = {0.5, 0.75};
  const double expected = simulate_makespan(make_schedule({"dualpipe", 8, 20}), costs);
  EXPECT_NEAR(makespan("--stage-scale 0:1.3,-1:1.5 --send 0.1 --boundary-send 2:0.3 --link 3-4:0.5 --straggler 2:1.25 "
                       "--pair-ready 0.5,0.75"),
              expected, 1e-9);
  write("costs.json", R"({"send": 0.1, "stages": [{"forward": 1.3, "backward": 2.6, "weight": 1.3},{},{},{},{},{},{},
    {"forward": 1.5, "backward": 3, "weight": 1.5}], "slowdown": [1, 1, 1.25],
    "sends": [{"boundary": 2, "duration": 0.3}, {"ranks": [4, 3], "duration": 0.5}],
    "pair_ready": {"activation": 0.5, "gradient": 0.75}})");
  EXPECT_NEAR(makespan("--costs costs.json"), expected, 1e-9);
  EXPECT_THAT(
      output("simulate --ranks 8 --microbatches 20 --costs costs.json"),
      HasSubstr("F=1 to 1.5 B=2 to 3 W=1 to 1.5 pair=(F+B)*1 send=0.1 to 0.5, rank 2 takes 1.25 times as long"));
}

TEST_F(PlanCosts, MeasuredFromATrace) {
  const std::string plan = "simulate --ranks 8 --microbatches 20 ";
  EXPECT_EQ(run(plan + "--stage-scale 3:1.2 --send 0.1 --format trace --output trace.json").code, 0);
  EXPECT_NEAR(makespan("--costs trace.json"), makespan("--stage-scale 3:1.2 --send 0.1"), 1e-6);
  const Result costs = run("costs trace.json --output costs.json");
  EXPECT_EQ(costs.code, 0) << costs.err;
  EXPECT_NEAR(makespan("--costs costs.json"), makespan("--costs trace.json"), 1e-9);
  // What a trace does not show is said, beside the result.
  const std::string plain = "simulate --schedule 1f1b --ranks 4 --microbatches 8";
  EXPECT_EQ(run(plain + " --format trace --output plain.json").code, 0);
  const Result noted = run(plain + " --costs plain.json --format json");
  EXPECT_EQ(noted.code, 0);
  EXPECT_THAT(noted.err, HasSubstr("plain.json: weight part of stages 0 to 3"));
  const std::string twice = run("compare --ranks 4 --microbatches 8 --costs plain.json").err;
  EXPECT_EQ(std::count(twice.begin(), twice.end(), '\n'), 2);  // two notes, once
  EXPECT_EQ(json::parse(noted.out)["makespan"], json_of(plain)["makespan"]);
}

TEST_F(PlanCosts, JitterTellsPercentiles) {
  const std::string arguments = "simulate --ranks 8 --microbatches 20 --jitter 0.1 --trials 200 --seed 3 ";
  const json first = json_of(arguments)["jitter"];
  EXPECT_EQ(first, json_of(arguments)["jitter"]);
  EXPECT_EQ(first["trials"], 200);
  EXPECT_EQ(first["seed"], 3);
  const std::vector<double> expected =
      simulate_jitter(make_schedule({"dualpipe", 8, 20}), {}, {.deviation = 0.1, .trials = 200, .seed = 3});
  for (const int percent : {5, 50, 95, 99})
    EXPECT_EQ(first["p" + std::to_string(percent)], percentile(expected, percent));
  EXPECT_THAT(output(arguments), HasSubstr("with 10 % jitter (log-normal, 200 trials, seed 3): makespan mean "));
}

TEST_F(PlanCosts, MemoryOfEachRank) {
  const std::string arguments = "simulate --ranks 8 --microbatches 20 --memory 2,0.5,6 ";
  const json result = json_of(arguments);
  ASSERT_EQ(result["memory"].size(), 8U);
  EXPECT_EQ(result["memory"][0]["state"], 12);
  EXPECT_GE(result["memory"][0]["peak"], 12 + 2 * 9);
  EXPECT_THAT(output(arguments), HasSubstr("of which 12 parameters and optimizer"));
}

TEST_F(PlanCosts, ParametersAndMemoryOfEachStage) {
  write("sizes.json", R"({"stages": [{"parameters": 12e6, "bytes": 24e6}, {"parameters": 500}]})");
  const std::string table =
      "stage  ranks  parameters  bytes\n"
      "    0    0,1        12 M   24 M\n"
      "    1    0,1         500\n"
      "at most 12 M parameters on a rank, rank 0\n";
  EXPECT_THAT(output("show --ranks 2 --microbatches 4 --costs sizes.json"), EndsWith(table));
  EXPECT_THAT(output("simulate --ranks 2 --microbatches 4 --costs sizes.json"), HasSubstr(table));

  const std::string v =
      "--schedule dualpipev --ranks 2 --microbatches 4 --parameters 40,10,10,20 --parameter-bytes 18 ";
  const json simulated = json_of("simulate --memory 5,0,0 " + v);
  EXPECT_EQ(simulated["stages"][3], json::parse(R"({"stage":3,"ranks":[0],"parameters":20,"bytes":0,"state":360})"));
  EXPECT_EQ(simulated["memory"][0]["state"], 18 * 60);
  EXPECT_EQ(simulated["memory"][1]["state"], 18 * 20);
  EXPECT_THAT(output("simulate " + v), HasSubstr("at most 60 parameters on a rank, rank 0\n"));

  const std::string compared = "compare dualpipe,dualpipev --ranks 2 --microbatches 4 --parameters 40,10,10,20";
  EXPECT_THAT(output(compared), HasSubstr("transfers  parameters\n"));
  const json rows = json_of(compared)["rows"];
  for (const auto& row : rows)
    EXPECT_EQ(row["parameters"], row["schedule"] == "dualpipe" ? 80 : 60);  // all of the model, or two of its quarters

  expect_refused("simulate --ranks 2 --microbatches 4 --parameters 1,2,3", 1,
                 "parameters of 3 stages, here there are 2");
  expect_refused("simulate --ranks 2 --microbatches 4 --parameters 1,-2", 1, "a stage has -2 parameters");
  expect_refused("simulate --ranks 2 --microbatches 4 --parameter-bytes 18", 1, "how many parameters each stage has");
  expect_refused("simulate --ranks 2 --microbatches 4 --parameters 1,2 --parameter-bytes -1", 1, "got -1");
}

TEST_F(PlanCosts, ShardedOptimizers) {
  const std::string sharded = "--ranks 8 --microbatches 20 --memory 0,0,18 --shard-optimizer ";
  const json ranks = json_of("simulate " + sharded)["memory"];
  for (const auto& rank : ranks) EXPECT_NEAR(rank["state"].get<double>(), 24, 1e-9);
  EXPECT_THAT(
      output("simulate " + sharded + "--replicas 3"),
      HasSubstr("The optimizer, 66.7 % of the state, is sharded over the ranks that hold a stage in 3 replicas.\n"
                "peak memory 16 on rank 0"));
  const json rows = json_of("compare dualpipe,dualpipev " + sharded + "--replicas 2 --optimizer-share 0.5")["rows"];
  for (const auto& row : rows)
    EXPECT_NEAR(row["peak_memory"].get<double>(), row["schedule"] == "dualpipe" ? 36 * (0.5 + 0.5 / 4) : 18 * 0.75,
                1e-9);
  EXPECT_THAT(output("compare dualpipe " + sharded), HasSubstr("The optimizer, 66.7 % of the state, is sharded"));
}

TEST_F(PlanCosts, BadCostsAreRefusedWithTheValue) {
  const std::string simulate = "simulate --ranks 8 --microbatches 20 ";
  expect_refused(simulate + "--shard-optimizer", 1, "--shard-optimizer needs to know what");
  expect_refused(simulate + "--memory 1,0,1 --shard-optimizer --replicas 0", 1, "at least one replica, got 0");
  expect_refused(simulate + "--memory 1,0,1 --shard-optimizer --optimizer-share 2", 1, "must be 0 to 1, got 2");
  expect_refused(simulate + "--replicas 2", 2, "requires --shard-optimizer");
  expect_refused(simulate + "--costs 0,2,1,3", 1, "the cost of forward must be positive, got 0");
  expect_refused(simulate + "--costs 1,-0.0,0,3", 1, "the cost of backward must be positive, got -0");
  expect_refused(simulate + "--costs 1,2,1,0", 1, "the cost of pair must be positive, got 0");
  expect_refused(simulate + "--costs 1e999,2,1,3", 1, "1e999 is beyond what a number can hold");
  expect_refused(simulate + "--costs 1e308,1e308,1,3", 1, "got inf");
  expect_refused(simulate + "--costs 1e306,2e306,1e306,3e307", 1, "add up to inf");
  expect_refused(simulate + "--costs 5", 2, "--costs: takes 4 numbers (F,B,W,FB), got 1");
  expect_refused(simulate + "--costs missing.json", 1, "missing.json");
  expect_refused(simulate + "--send nan", 1, "send must be finite and not negative, got nan");
  expect_refused(simulate + "--stage-scale 8:1.5", 1, "there is no stage 8 of 8");
  expect_refused(simulate + "--stage-scale 1:0", 1, "must be positive, got 0");
  expect_refused(simulate + "--stage-scale 1:-2", 1, "got -2");
  expect_refused(simulate + "--stage-scale 1", 2, "takes STAGE:FACTOR, got 1");
  expect_refused(simulate + "--stage-scale a:1", 2, "'a' is not a number");
  expect_refused(simulate + "--boundary-send 7:1", 1, "there is no boundary 7 of 7");
  expect_refused(simulate + "--link 3:1", 2, "takes RANK-RANK:DURATION, got 3:1");
  expect_refused(simulate + "--link 3-8:1", 1, "there is no rank 8 of 8");
  expect_refused(simulate + "--straggler 2:0", 1, "the slowdown of rank 2 must be a positive factor, got 0");
  expect_refused(simulate + "--straggler 2:inf", 1, "got inf");
  expect_refused(simulate + "--memory 1,2", 2, "takes 3 numbers");
  expect_refused(simulate + "--memory 1,0,-2", 1, "got -2");
  expect_refused(simulate + "--pair-ready 0,0.5", 1, "above 0 and up to 1");
  expect_refused(simulate + "--jitter -0.1", 1, "got -0.1");
  expect_refused(simulate + "--jitter 0.1 --trials 0", 1, "got 0");
  expect_refused(simulate + "--jitter 0.1 --format svg", 2, "percentiles");
  expect_refused(simulate + "--trials 5", 2, "--jitter");
  write("four.json", R"({"stages": [{}, {}, {}, {}]})");
  expect_refused(simulate + "--costs four.json", 1, "has costs of 4 stages, here there are 8; 'compare' spreads them");
  write("typo.json", R"({"foward": 1})");
  expect_refused(simulate + "--costs typo.json", 1, "typo.json: costs: unknown key \"foward\"");
  write("trace.json", R"({"traceEvents": []})");
  expect_refused(simulate + "--costs trace.json", 1, "trace.json: not a trace of this library");
}

TEST_F(PlanCosts, CompareAnswersTwentyOrSixteen) {
  const Result result = run("compare --ranks 8 --microbatches 20,16");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  EXPECT_THAT(result.out, StartsWith("Costs of one stage of 8: F=1 B=2 W=1 pair=3 send=0"));
  EXPECT_THAT(result.out, HasSubstr("On 8 ranks: 20 micro-batches with "));
  EXPECT_THAT(result.out, HasSubstr("; then 16 ("));

  const json table = json_of("compare --ranks 8,7 --microbatches 20,16 --memory-limit 9");
  EXPECT_EQ(table["rows"].size(), 4 * schedule_kinds().size());
  EXPECT_EQ(table["memory_limit"], 9);
  EXPECT_EQ(table["stages_described"], 7);
  const std::string csv = output("compare dualpipe,1f1b --ranks 8,7 --microbatches 20 --format csv");
  EXPECT_THAT(csv, StartsWith("schedule,ranks,micro_batches,per_micro_batch,makespan,"));
  EXPECT_THAT(csv, HasSubstr("dualpipe,7,20,,,,,,,,,\"DualPipe needs an even number of ranks, got 7;"));
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 5);
}

TEST_F(PlanCosts, CompareTakesFilesAndLimits) {
  write("mine.csv", to_csv(make_schedule({"zb1p", 4, 8})));
  const Result alone = run("compare mine.csv --costs 1,2,1,3");
  EXPECT_EQ(alone.code, 0) << alone.err;
  EXPECT_THAT(alone.out, HasSubstr("On 4 ranks: 8 micro-batches with mine.csv"));
  EXPECT_THAT(output("compare mine.csv,1f1b --ranks 4 --microbatches 8,16 --memory-limit 1"),
              HasSubstr("over the limit\n"));
  EXPECT_THAT(output("compare mine.csv --memory-limit 1"), HasSubstr("No schedule fits.\n"));
  EXPECT_THAT(output("compare --ranks 3 --microbatches 4"),
              HasSubstr("Not possible:\n  dualpipe, 3 ranks, 4 micro-batches: DualPipe needs an even number"));
  // The costs of four stages serve any cut of the model.
  write("four.json", R"({"stages": [{"forward": 1.3}, {}, {}, {"forward": 1.5}]})");
  EXPECT_EQ(json_of("compare --ranks 2,8 --microbatches 16 --costs four.json")["stages_described"], 4);

  const json rows =
      json_of("compare 1f1b --ranks 4 --microbatches 8 --memory 1,0,0 --recompute 0.1 --publish atomic")["rows"];
  EXPECT_DOUBLE_EQ(rows[0]["peak_memory"], 1 + 3 * 0.1);
  EXPECT_EQ(rows[0]["makespan"], 11 * 4);  // forwards of 1, backwards of 3
  expect_refused("compare --ranks 4 --microbatches 8 --recompute 2", 1, "2 cannot stay of an activation");

  expect_refused("compare", 2, "needs --ranks and --microbatches");
  expect_refused("compare --ranks 4", 2, "needs --ranks and --microbatches");
  expect_refused("compare --ranks 4,0 --microbatches 8", 2, "--ranks");
  expect_refused("compare --ranks 4 --microbatches 8,-2", 2, "--microbatches");
  expect_refused("compare zigzag --ranks 4 --microbatches 8", 1, "\"zigzag\"");
  expect_refused("compare --ranks 4 --microbatches 8 --memory-limit 0", 1, "must be positive, got 0");
  expect_refused("compare --ranks 4 --microbatches 8 --memory-limit nan", 1, "got nan");
  expect_refused("compare --ranks 4 --microbatches 8 --costs 1,2,0.5,0", 1, "pair must be positive");
}

TEST_F(PlanCosts, HelpOfTheCommands) {
  EXPECT_THAT(output("compare --help"), HasSubstr("--memory-limit X"));
  EXPECT_THAT(output("costs --help"), HasSubstr("seconds_per_unit"));
  EXPECT_THAT(output("simulate --help"), HasSubstr("--stage-scale STAGE:FACTOR,..."));
}

}  // namespace
}  // namespace dualpipe::planner
