#pragma once

#include <cstdint>
#include <vector>

#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/transfer.hpp"

namespace dualpipe::planner {

/// Random durations: the cost of each step and each transfer is multiplied by a factor, drawn independently from a
/// log-normal distribution of mean 1 and standard deviation `deviation`. For a rank that is always slow there is
/// `Costs::slowdown`.
struct Jitter {
  double deviation = 0.1;  ///< 0.1: 10 %
  int trials = 1000;
  std::uint64_t seed = 1;
};

/// The makespans of all trials, ascending. The same seed gives the same makespans.
///
/// @throws InvalidArgument  as simulate does, and a deviation outside of [0, 10], or no trials.
std::vector<double> simulate_jitter(const Schedule& schedule, const Costs& costs, const Jitter& jitter,
                                    Publish publish = Publish::early);

/// Of ascending values, interpolated between neighbours: percentile(values, 50) is the median.
///
/// @throws InvalidArgument  no values, or `percent` outside of [0, 100].
double percentile(const std::vector<double>& ascending, double percent);

}  // namespace dualpipe::planner
