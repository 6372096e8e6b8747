#include "dualpipe/planner/compare.hpp"

#include <algorithm>
#include <cstddef>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/simulator.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::planner {
namespace {

void evaluate(const Schedule& schedule, const CostModel& model, Publish publish, ComparedSchedule& row) {
  detail::Simulator simulator(model.time, publish);
  row.makespan = simulator.load_or_throw(schedule);
  row.per_micro_batch = row.makespan / row.num_micro_batches;
  std::vector<double> busy(schedule.ranks.size(), 0);
  for (const detail::Simulator::Node& node : simulator.nodes()) {
    busy[node.rank] += node.duration;
    for (const int to : node.to) row.num_transfers += to >= 0 && to != node.rank;
  }
  double all = 0;
  for (const double time : busy) {
    all += time;
    row.bubble = std::max(row.bubble, row.makespan - time);
  }
  const double available = row.makespan * static_cast<double>(busy.size());
  row.efficiency = available > 0 ? all / available : 0;
  for (const double parameters : parameters_of_ranks(schedule, model.sizes))
    row.parameters = std::max(row.parameters, parameters);
  for (const RankMemory& rank : memory(schedule, model.memory)) {
    row.peak_memory = std::max(row.peak_memory, rank.peak);
    row.peak_activations = std::max(row.peak_activations, rank.peak_activations);
  }
}

int described_stages(const ComparisonSpec& spec, const CostModel& model) {
  if (spec.described_stages > 0) return spec.described_stages;
  for (const std::size_t listed : {model.time.stages.size(), model.memory.stages.size(), model.sizes.size()})
    if (listed > 0) return static_cast<int>(listed);
  std::vector<int> ranks = spec.ranks;
  for (const Schedule& schedule : spec.given) ranks.push_back(static_cast<int>(schedule.ranks.size()));
  return std::max(1, *std::min_element(ranks.begin(), ranks.end()));
}

bool comes_before(const ComparedSchedule& a, const ComparedSchedule& b) {
  const auto key = [](const ComparedSchedule& row) {
    return std::tuple(!row.refused.empty(), static_cast<float>(row.per_micro_batch),
                      static_cast<float>(row.peak_memory), row.num_ranks, row.num_micro_batches);
  };
  return key(a) < key(b);
}

}  // namespace

Comparison compare(const ComparisonSpec& spec, const CostModel& model) {
  DUALPIPE_CHECK(!spec.given.empty() || (!spec.kinds.empty() && !spec.ranks.empty() && !spec.micro_batches.empty()),
                 "nothing to compare: name kinds, numbers of ranks and numbers of micro-batches, or give schedules");
  DUALPIPE_CHECK(spec.memory_limit >= 0, "the memory limit must not be negative, got ", spec.memory_limit);
  DUALPIPE_CHECK(spec.described_stages >= 0, "the costs are of at least one stage, got ", spec.described_stages);

  Comparison result{.described_stages = described_stages(spec, model), .rows = {}};
  // Costs that are wrong for all rows are an error of the call, not of a row.
  Costs anywhere = model.time;
  anywhere.slowdown.clear();
  std::erase_if(anywhere.sends, [](const SendCost& send) { return send.rank_a != SendCost::any; });
  check(anywhere, 1, result.described_stages);
  check(model.memory, result.described_stages);

  const std::size_t all = spec.given.size() + spec.kinds.size() * spec.ranks.size() * spec.micro_batches.size();
  const auto add = [&](ComparedSchedule row, const auto& make) {
    try {
      const Schedule& schedule = make();
      evaluate(schedule, spread(model, result.described_stages, schedule.num_stages), spec.publish, row);
      row.over_limit = row.peak_memory > spec.memory_limit;
    } catch (const InvalidArgument& error) {
      row = {.name = row.name,
             .num_ranks = row.num_ranks,
             .num_micro_batches = row.num_micro_batches,
             .refused = error.what()};
    }
    result.rows.push_back(std::move(row));
    if (spec.progress) spec.progress(static_cast<int>(result.rows.size()), static_cast<int>(all));
  };
  for (const Schedule& schedule : spec.given)
    add({.name = schedule.name,
         .num_ranks = static_cast<int>(schedule.ranks.size()),
         .num_micro_batches = schedule.num_micro_batches},
        [&]() -> const Schedule& { return schedule; });
  for (const std::string& kind : spec.kinds)
    for (const int ranks : spec.ranks)
      for (const int micro_batches : spec.micro_batches)
        add({.name = kind, .num_ranks = ranks, .num_micro_batches = micro_batches},
            [&] { return make_schedule({kind, ranks, micro_batches, spec.chunks_per_rank}); });
  std::stable_sort(result.rows.begin(), result.rows.end(), comes_before);
  return result;
}

}  // namespace dualpipe::planner
