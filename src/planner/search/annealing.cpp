#include "planner/search/annealing.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace dualpipe::detail {
namespace {

// Temperatures, in durations of a step: at the beginning of the runs from the best starts; of the last run, from the
// best order seen; and at the end of each run, as a share of its first.
constexpr std::array<double, 2> warm = {1, 0.25};
constexpr std::array<double, 2> share = {0.4, 0.2};  // of the budget
constexpr double cool = 0.12, end = 0.02;

// Weight of the ranks' mean end time beside the makespan: it rewards changes that do not shorten the makespan yet.
constexpr double finish_weight = 0.02;

// Budget in simulated steps where none is given: some seconds.
constexpr std::int64_t default_steps = 100'000'000, fewest = 1000, most = 1'000'000;

constexpr double rounding = 1e-9, report_every = 0.1;

}  // namespace

Annealing::Annealing(const SearchProblem& problem, const planner::SearchOptions& options, double bound)
    : problem_(problem),
      options_(options),
      bound_(bound),
      budget_(options.evaluations),
      simulator_(problem.costs, problem.publish),
      number_(problem),
      random_(options.seed) {
  const std::int64_t steps = std::int64_t{2} * problem.num_stages * problem.num_micro_batches;
  if (budget_ == 0) budget_ = std::clamp(default_steps / steps, fewest, most);
}

double Annealing::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
}

bool Annealing::add(Schedule schedule) {
  for (int rank = 0; rank < problem_.num_ranks; ++rank)
    if (!number_(schedule.ranks[rank], rank)) return false;
  if (!simulator_.load(schedule)) return false;
  const double makespan = simulator_.makespan();
  if (makespan < best_makespan_) {
    best_makespan_ = makespan;
    best_ = schedule;
  }
  starts_.emplace_back(makespan, std::move(schedule));
  std::stable_sort(starts_.begin(), starts_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  starts_.resize(std::min(starts_.size(), warm.size()));
  return true;
}

void Annealing::run() {
  if (shall_end()) return;
  simulator_.load(best_);
  for (const Simulator::Node& node : simulator_.nodes()) step_duration_ += node.duration;
  step_duration_ /= static_cast<double>(simulator_.nodes().size());
  if (options_.evaluations == 0 && options_.seconds > 0) budget_ = affordable();
  for (std::size_t i = 0; i < starts_.size(); ++i) {
    const auto budget = static_cast<std::int64_t>(share[i] * static_cast<double>(budget_));
    if (!improve(starts_[i].second, budget, warm[i])) return;
  }
  improve(best_, budget_ - evaluations_, cool);
}

// As many evaluations as time allows: temperatures follow the budget.
std::int64_t Annealing::affordable() {
  constexpr double sample = 0.02, overhead = 1.5;
  std::int64_t count = 0;
  const double from = seconds();
  do {
    energy(best_);
    ++count;
  } while (seconds() < from + sample);
  const double each = overhead * (seconds() - from) / static_cast<double>(count);
  return static_cast<std::int64_t>(std::clamp(options_.seconds / each, 1.0, 1e12));
}

double Annealing::energy(const Schedule& schedule) {
  if (!simulator_.load(schedule)) return infinite;
  makespan_ = simulator_.makespan();
  double finish = 0;
  const auto& nodes = simulator_.nodes();
  for (std::size_t i = 0; i < nodes.size(); ++i)
    if (nodes[i].at + 1 == static_cast<int>(schedule.ranks[nodes[i].rank].size()))
      finish += simulator_.begins()[i] + nodes[i].duration;
  return makespan_ + finish_weight * finish / problem_.num_ranks;
}

bool Annealing::shall_end() {
  if (best_makespan_ <= bound_ * (1 + rounding)) return true;
  if (options_.seconds <= 0 && !options_.progress) return false;
  const double now = seconds();
  if (options_.seconds > 0 && now >= options_.seconds) return true;
  if (!options_.progress || now < reported_ + report_every) return false;
  reported_ = now;
  return !options_.progress({evaluations_, budget_, now, best_makespan_, bound_});
}

// Mostly one change, sometimes several: some orders improve only if two ranks change together.
bool Annealing::change(Schedule& current, const std::vector<CriticalStep>& critical) {
  undo_.clear();
  for (int changes = random_.below(8) == 0 ? 2 + random_.below(2) : 1; changes > 0; --changes) {
    std::vector<Step> steps;
    const int rank = propose(current, critical, random_, steps);
    if (rank < 0 || !number_(steps, rank) || steps == current.ranks[rank]) continue;
    current.ranks[rank].swap(steps);
    undo_.emplace_back(rank, std::move(steps));
  }
  return !undo_.empty();
}

void Annealing::undo(Schedule& current) {
  for (; !undo_.empty(); undo_.pop_back()) current.ranks[undo_.back().first].swap(undo_.back().second);
}

// False: the whole search shall end.
bool Annealing::improve(Schedule current, std::int64_t budget, double first) {
  double here = energy(current);
  std::vector<CriticalStep> critical = critical_steps(current, simulator_, problem_, random_);
  // Limits the attempts that change nothing.
  std::int64_t attempts = 20 * budget;
  for (std::int64_t done = 0; done < budget && attempts > 0; --attempts) {
    if (!change(current, critical)) continue;
    ++done;
    ++evaluations_;
    const double there = energy(current);
    const double temperature =
        step_duration_ * first * std::pow(end, static_cast<double>(done) / static_cast<double>(budget));
    if (there <= here || random_.fraction() < std::exp((here - there) / temperature)) {
      here = there;
      critical = critical_steps(current, simulator_, problem_, random_);
      if (makespan_ < best_makespan_ * (1 - rounding)) {
        best_makespan_ = makespan_;
        best_ = current;
      }
    } else {
      undo(current);
    }
    if (shall_end()) return false;
  }
  return true;
}

}  // namespace dualpipe::detail
