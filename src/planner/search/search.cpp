#include "dualpipe/planner/search.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/memory.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "planner/search/annealing.hpp"
#include "planner/search/problem.hpp"

namespace dualpipe::planner {
namespace {

using detail::Annealing;
using detail::list_schedule;
using detail::ListRule;
using detail::PipelineRoute;
using detail::SearchProblem;

/// Kinds that share a placement, by the first of them.
const std::vector<std::vector<std::string>>& placements() {
  static const std::vector<std::vector<std::string>> kinds = {
      {"dualpipe"}, {"dualpipev", "zbv"}, {"1f1b", "zb1p", "gpipe"}, {"interleaved"}};
  return kinds;
}

const std::vector<std::string>& relatives(const std::string& kind) {
  for (const auto& kinds : placements())
    if (std::find(kinds.begin(), kinds.end(), kind) != kinds.end()) return kinds;
  make_schedule({.kind = kind, .num_ranks = 1, .num_micro_batches = 1});  // throws, and names the kinds there are
  return placements().front();
}

/// As `placement`, also where the kind has no order.
std::vector<int> placement_of(const ScheduleSpec& spec) {
  const std::string& placement = relatives(spec.kind).front();
  const int ranks = spec.num_ranks, micro_batches = spec.num_micro_batches;
  std::vector<int> table;
  for (int stage = 0; stage < num_stages(spec); ++stage)
    for (int m = 0; m < micro_batches; ++m) {
      const bool from_the_end = placement == "dualpipe" && m >= (micro_batches + 1) / 2;
      const bool back = placement == "dualpipev" && stage >= ranks;
      table.push_back(from_the_end ? ranks - 1 - stage : back ? 2 * ranks - 1 - stage : stage % ranks);
    }
  return table;
}

std::optional<Schedule> published(ScheduleSpec spec, const std::string& kind) {
  spec.kind = kind;
  try {
    return make_schedule(spec);
  } catch (const InvalidArgument&) {
    return std::nullopt;
  }
}

/// Fills in the limits that are left open: what `order` needs.
SearchLimits filled_in(SearchLimits limits, const Schedule& order) {
  int activations = 0, weights = 0;
  for (const RankMemory& rank : memory(order)) {
    activations = std::max(activations, rank.peak_activations);
    weights = std::max(weights, rank.peak_weights);
  }
  if (limits.activations == 0) limits.activations = activations;
  if (limits.weights < 0) limits.weights = weights;
  return limits;
}

/// How many micro-batches may be on their way so that the ranks never block each other: each finds room everywhere.
int never_blocking(const SearchProblem& problem) {
  double most = std::numeric_limits<double>::infinity();
  for (int rank = 0; rank < problem.num_ranks; ++rank) {
    int count = 0;
    double size = 0;
    for (const PipelineRoute& route : problem.routes) {
      int here = 0;
      double held = 0;
      for (const int stage : problem.stages_of[rank])
        if (route.ranks[stage] == rank) {
          ++here;
          held += problem.memory[stage].activation;
        }
      count = std::max(count, here);
      size = std::max(size, held);
    }
    if (count > 0) most = std::min(most, std::floor(problem.limits.activations / static_cast<double>(count)));
    const double room = problem.limits.memory - problem.state_of(rank);
    DUALPIPE_CHECK(room >= size, "rank ", rank, " needs at least ", problem.state_of(rank) + size,
                   " of memory (state, and the activations of one micro-batch), but the limit is ",
                   problem.limits.memory);
    if (size > 0) most = std::min(most, std::floor(room / size));
    DUALPIPE_CHECK(count <= problem.limits.activations, "rank ", rank, " holds ", count,
                   " activations of each micro-batch, but the limit is ", problem.limits.activations);
  }
  return static_cast<int>(std::min(most, static_cast<double>(problem.num_micro_batches)));
}

SearchResult search_from(const SearchProblem& problem, std::vector<Schedule> orders, const SearchOptions& options) {
  SearchResult result;
  result.bound = detail::lower_bound(problem);
  result.limits = problem.limits;
  Annealing search(problem, options, result.bound.makespan);
  for (Schedule& order : orders) {
    const double makespan = simulate_makespan(order, problem.costs, problem.publish);
    std::string name = order.name;
    const bool fits = search.add(std::move(order));
    result.starts.push_back({std::move(name), makespan, fits, true});
  }
  SearchStart best_list{"list schedule", std::numeric_limits<double>::infinity(), true, false};
  const int safe = never_blocking(problem);
  for (int which = 0; which < 16; ++which) {
    const ListRule rule{(which & 1) != 0, (which & 2) != 0, (which & 4) != 0, (which & 8) != 0 ? safe : 0};
    auto order = list_schedule(problem, rule);
    if (!order) continue;
    best_list.makespan = std::min(best_list.makespan, simulate_makespan(*order, problem.costs, problem.publish));
    search.add(*std::move(order));
  }
  result.starts.push_back(best_list);
  search.run();
  result.schedule = search.best();
  result.makespan = search.best_makespan();
  result.evaluations = search.evaluations();
  result.schedule.name = "searched";
  check(result.schedule);
  dry_run(lower(result.schedule, options.publish, problem.costs.ready));
  result.seconds = search.seconds();
  return result;
}

}  // namespace

int num_stages(const ScheduleSpec& spec) {
  const std::string& placement = relatives(spec.kind).front();
  return spec.num_ranks * (placement == "dualpipev" ? 2 : placement == "interleaved" ? spec.chunks_per_rank : 1);
}

SearchResult search(const ScheduleSpec& spec, const CostModel& model, const SearchOptions& options) {
  DUALPIPE_CHECK(spec.num_ranks >= 1 && spec.num_micro_batches >= 1 && spec.chunks_per_rank >= 1,
                 "a search needs at least one rank, micro-batch and chunk, got ", spec.num_ranks, ", ",
                 spec.num_micro_batches, " and ", spec.chunks_per_rank);
  constexpr double most = 1e7;
  const double forwards = static_cast<double>(spec.num_ranks) * spec.chunks_per_rank * spec.num_micro_batches;
  DUALPIPE_CHECK(forwards <= most, "a search through ", forwards, " forwards would not end; at most ", most);
  std::vector<Schedule> orders;
  std::vector<std::string> kinds = relatives(spec.kind);
  std::stable_partition(kinds.begin(), kinds.end(), [&](const std::string& kind) { return kind == spec.kind; });
  for (const std::string& kind : kinds)
    if (auto order = published(spec, kind)) orders.push_back(*std::move(order));

  SearchOptions all = options;
  // Where the kind has no order for these numbers, the next larger one that it has says what it would hold.
  auto like = published(spec, spec.kind);
  for (ScheduleSpec larger = spec; !like; ++larger.num_ranks) {
    larger.num_micro_batches = 4 * larger.num_ranks;
    like = published(larger, spec.kind);
  }
  all.limits = filled_in(options.limits, *like);
  const SearchProblem problem(spec.num_ranks, num_stages(spec), spec.num_micro_batches, placement_of(spec), model, all);
  return search_from(problem, std::move(orders), all);
}

SearchResult search(const Schedule& start, const CostModel& model, const SearchOptions& options) {
  check(start);
  SearchOptions all = options;
  all.limits = filled_in(options.limits, start);
  const SearchProblem problem(static_cast<int>(start.ranks.size()), start.num_stages, start.num_micro_batches,
                              placement(start), model, all);
  return search_from(problem, {start}, all);
}

}  // namespace dualpipe::planner
