// Plans a step with an installed dualpipe::schedule.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string_view>

#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "dualpipe/version.hpp"

int main() {
  const auto schedule = dualpipe::make_schedule({.kind = "dualpipe", .num_ranks = 8, .num_micro_batches = 20});
  dualpipe::check(schedule);
  const auto simulation = dualpipe::simulate(schedule, {}, dualpipe::Publish::atomic);
  double makespan = 0;
  for (const auto& interval : simulation.timeline.intervals) makespan = std::max(makespan, interval.end);

  // 66 is the published makespan of this size in units of F, with B = 2, W = 1 and a pair of 3.
  std::cout << "dualpipe " << DUALPIPE_VERSION << ": makespan " << makespan << ", expected 66\n";
  return makespan == 66 && std::string_view(PACKAGE_VERSION) == DUALPIPE_VERSION ? EXIT_SUCCESS : EXIT_FAILURE;
}
