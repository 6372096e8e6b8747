// How long the schedule layer takes: all that happens in a constructor before anything is sent, and what planning and
// searching do many times. Run as dualpipe-bench-schedule.
#include <benchmark/benchmark.h>

#include "dualpipe/detail/schedule/simulator.hpp"
#include "dualpipe/planner/compare.hpp"
#include "dualpipe/planner/jitter.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe {
namespace {

Schedule dualpipe_of(const benchmark::State& state) {
  return make_schedule({"dualpipe", static_cast<int>(state.range(0)), static_cast<int>(state.range(1))});
}

void count_ops(benchmark::State& state, const Schedule& schedule) {
  std::size_t steps = 0;
  for (const auto& rank : schedule.ranks) steps += rank.size();
  state.counters["steps"] = static_cast<double>(steps);
  state.counters["steps/s"] =
      benchmark::Counter(static_cast<double>(steps), benchmark::Counter::kIsIterationInvariantRate);
}

/// make, check, lower and dry run.
void prepare(benchmark::State& state) {
  for (auto _ : state) {
    const Schedule schedule = dualpipe_of(state);
    check(schedule);
    const Program program = lower(schedule);
    dry_run(program);
    benchmark::DoNotOptimize(program.order.data());
  }
  count_ops(state, dualpipe_of(state));
}
BENCHMARK(prepare)->Args({8, 20})->Args({16, 64})->Args({64, 512})->Args({128, 2048})->Unit(benchmark::kMillisecond);

/// With a timeline for pictures and reports.
void simulate_timeline(benchmark::State& state) {
  const Schedule schedule = dualpipe_of(state);
  for (auto _ : state) benchmark::DoNotOptimize(simulate(schedule, {.send = 0.1}));
  count_ops(state, schedule);
}
BENCHMARK(simulate_timeline)->Args({8, 20})->Args({16, 64})->Args({128, 2048})->Unit(benchmark::kMillisecond);

/// As search evaluates an order: loaded into the same simulator again, then run.
void evaluate_order(benchmark::State& state) {
  const Schedule schedule = dualpipe_of(state);
  detail::Simulator simulator({.send = 0.1}, Publish::early);
  for (auto _ : state) {
    benchmark::DoNotOptimize(simulator.load(schedule));
    benchmark::DoNotOptimize(simulator.makespan());
  }
  count_ops(state, schedule);
}
BENCHMARK(evaluate_order)->Args({8, 20})->Args({16, 64})->Unit(benchmark::kMicrosecond);

/// 1000 trials.
void jitter_trials(benchmark::State& state) {
  const Schedule schedule = dualpipe_of(state);
  for (auto _ : state) benchmark::DoNotOptimize(planner::simulate_jitter(schedule, {.send = 0.1}, {.trials = 1000}));
}
BENCHMARK(jitter_trials)->Args({8, 20})->Args({16, 64})->Unit(benchmark::kMillisecond);

/// Every kind with three numbers of ranks and three of micro-batches.
void compare_kinds(benchmark::State& state) {
  for (auto _ : state)
    benchmark::DoNotOptimize(planner::compare({.ranks = {4, 8, 16}, .micro_batches = {16, 20, 32}}, {}));
}
BENCHMARK(compare_kinds)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace dualpipe

BENCHMARK_MAIN();
