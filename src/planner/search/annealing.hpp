#pragma once

#include <chrono>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/simulator.hpp"
#include "planner/search/moves.hpp"
#include "planner/search/problem.hpp"

namespace dualpipe::detail {

/// Simulated annealing over orders: a change that makes the order slower is kept now and then, the less often the
/// longer the search has run, so that it gets out of dead ends. The last run goes on from the best order that the runs
/// from the best starts have seen. Ends early where the bound is reached.
class Annealing {
 public:
  Annealing(const SearchProblem& problem, const planner::SearchOptions& options, double bound);

  /// Takes a start in. @return  whether it is within the limits.
  bool add(Schedule schedule);
  /// After at least one `add` that returned true.
  void run();

  const Schedule& best() const { return best_; }
  double best_makespan() const { return best_makespan_; }
  std::int64_t evaluations() const { return evaluations_; }
  double seconds() const;

 private:
  double energy(const Schedule& schedule);
  std::int64_t affordable();
  bool change(Schedule& current, const std::vector<CriticalStep>& critical);
  void undo(Schedule& current);
  bool improve(Schedule current, std::int64_t budget, double warm);
  bool shall_end();

  static constexpr double infinite = std::numeric_limits<double>::infinity();

  const SearchProblem& problem_;
  const planner::SearchOptions& options_;
  const double bound_;
  std::int64_t budget_ = 0;
  Simulator simulator_;
  Numbering number_;
  Random random_;
  std::vector<std::pair<double, Schedule>> starts_;      // with their makespans
  double step_duration_ = 0;                             // on average
  std::vector<std::pair<int, std::vector<Step>>> undo_;  // ranks and what they did before the last change
  Schedule best_;
  double best_makespan_ = infinite;
  double makespan_ = infinite;  // of the last evaluation
  std::int64_t evaluations_ = 0;
  std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  double reported_ = 0;  // when `progress` was called last
};

}  // namespace dualpipe::detail
