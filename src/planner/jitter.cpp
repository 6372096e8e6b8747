#include "dualpipe/planner/jitter.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include "dualpipe/detail/schedule/simulator.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::planner {

std::vector<double> simulate_jitter(const Schedule& schedule, const Costs& costs, const Jitter& jitter,
                                    Publish publish) {
  constexpr int max_trials = 100'000'000;  // their makespans fit into memory
  constexpr double max_deviation = 10;     // far beyond it most factors are 0 and some overflow
  DUALPIPE_CHECK(jitter.deviation >= 0 && jitter.deviation <= max_deviation, "jitter must be from 0 to ", max_deviation,
                 ", as a fraction, got ", jitter.deviation);
  DUALPIPE_CHECK(jitter.trials >= 1 && jitter.trials <= max_trials, "trials must be from 1 to ", max_trials, ", got ",
                 jitter.trials);
  detail::Simulator simulator(costs, publish);
  simulator.load_or_throw(schedule);

  // The logarithm is normal, of variance ln(1 + deviation^2), and of the mean that makes the factors' mean 1.
  const double variance = std::log1p(jitter.deviation * jitter.deviation);
  std::normal_distribution<double> normal;
  std::mt19937_64 random(jitter.seed);
  const auto factor = [&, spread = std::sqrt(variance)] { return std::exp(spread * normal(random) - variance / 2); };
  std::vector<double> makespans(jitter.trials);
  for (double& makespan : makespans) {
    makespan = simulator.makespan(factor);
    DUALPIPE_CHECK(std::isfinite(makespan), "with a jitter of ", jitter.deviation, " the costs add up to ", makespan);
  }
  std::sort(makespans.begin(), makespans.end());
  return makespans;
}

double percentile(const std::vector<double>& ascending, double percent) {
  DUALPIPE_CHECK(!ascending.empty() && percent >= 0 && percent <= 100, "percentile ", percent, " of ", ascending.size(),
                 " values");
  const double place = percent / 100 * static_cast<double>(ascending.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, ascending.size() - 1);
  return std::lerp(ascending[below], ascending[above], place - static_cast<double>(below));
}

}  // namespace dualpipe::planner
