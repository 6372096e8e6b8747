#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "dualpipe/detail/schedule/simulator.hpp"
#include "planner/search/problem.hpp"

namespace dualpipe::detail {

/// The same numbers on every machine, which the distributions of the standard library do not give.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  /// 0 to bound - 1; bound > 0.
  int below(std::size_t bound) { return static_cast<int>(engine_() % bound); }
  /// [0, 1)
  double fraction() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

 private:
  std::mt19937_64 engine_;
};

/// A step on the critical path that waited for the step before it on its rank.
struct CriticalStep {
  int rank = 0;
  int at = 0;
};

/// All such steps of one critical path of the last evaluation. Where a step waited for two things at once, the path
/// goes on through either.
std::vector<CriticalStep> critical_steps(const Schedule& schedule, const Simulator& simulator,
                                         const SearchProblem& problem, Random& random);

/// Changes the order of one rank in one place, mostly at one of `critical`.
///
/// @param steps  receives the changed order of the rank, not yet renamed nor checked.
/// @return  the rank, -1 where the attempt makes no sense.
int propose(const Schedule& schedule, const std::vector<CriticalStep>& critical, Random& random,
            std::vector<Step>& steps);

}  // namespace dualpipe::detail
