#include "planner/picture.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <set>
#include <unordered_map>
#include <utility>

#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"

namespace dualpipe::detail {
namespace {

void sort_by_begin(std::vector<const Interval*>& intervals) {
  std::stable_sort(intervals.begin(), intervals.end(),
                   [](const Interval* a, const Interval* b) { return a->begin < b->begin; });
}

}  // namespace

Picture::Picture(const Timeline& timeline, const planner::PictureOptions& options)
    : num_ranks(std::max(0, timeline.num_ranks)) {
  std::vector<Row> all(num_ranks);
  std::vector<Activity> active = activities(timeline);
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    all[rank].rank = static_cast<int>(rank);
    all[rank].activity = std::move(active[rank]);
  }
  const planner::Window whole = planner::extent(timeline), window = options.window.value_or(whole);
  DUALPIPE_CHECK(!options.window || (window.begin < window.end && window.begin < whole.end && window.end > whole.begin),
                 "the window from ", window.begin - whole.begin, " to ", window.end - whole.begin,
                 " shows nothing of a timeline that lasts ", whole.length());
  origin = whole.begin;
  begin = options.window ? std::max(window.begin, whole.begin) : whole.begin;
  end = options.window ? std::min(window.end, whole.end) : whole.end;

  std::vector<std::pair<int, int>> first(all.size(), {std::numeric_limits<int>::max(), 0});  // micro-batch and stage
  double shortest = std::numeric_limits<double>::infinity();
  std::set<std::pair<bool, int>> micro_batches;  // of nodes: forward or not, which
  for (const Interval& interval : timeline.intervals) {
    DUALPIPE_CHECK(std::isfinite(interval.begin) && std::isfinite(interval.end) && interval.begin <= interval.end,
                   to_string(interval.step), " of rank ", interval.rank, " lasts from ", interval.begin, " to ",
                   interval.end);
    Row& row = all[interval.rank];
    const bool in_view = interval.begin < end && interval.end > begin && interval.begin < interval.end;
    if (interval.lane == Lane::compute) {
      const auto see = [&](const Op& op) {
        num_micro_batches = std::max(num_micro_batches, std::int64_t{op.micro_batch} + 1);
        num_stages = std::max(num_stages, std::int64_t{op.stage} + 1);
        auto& earliest = first[interval.rank];
        earliest = std::min(earliest, {op.micro_batch, op.stage});
      };
      visit_ops(interval.step, see);
      if (in_view) shortest = std::min(shortest, interval.end - interval.begin);
    } else if (in_view) {
      if (interval.lane == Lane::node || interval.lane == Lane::collective)
        micro_batches.emplace(interval.step.op.pass == Pass::Forward, interval.step.op.micro_batch);
      (interval.lane == Lane::node         ? row.nodes
       : interval.lane == Lane::collective ? row.collectives
       : interval.lane == Lane::reduction  ? row.reductions
                                           : row.transfers)
          .push_back(&interval);
    }
  }
  for (const auto& [micro_batch, stage] : first) first_stages.push_back(stage);
  for (const Row& row : all)
    for (const ActiveStep& step : row.activity.steps)
      visit_ops(step.interval->step, [&](const Op& op) { second_halves = second_halves || second_half(row.rank, op); });
  one_pair = micro_batches.size() <= 2;
  if (std::isfinite(shortest)) unit = std::max(shortest, length() / max_units);

  std::vector<int> shown_ranks = options.ranks;
  for (int rank = 0; options.ranks.empty() && rank < num_ranks; ++rank) shown_ranks.push_back(rank);
  for (const int rank : shown_ranks) {
    DUALPIPE_CHECK(rank >= 0 && rank < num_ranks, "rank ", rank, " cannot be shown, there are ", num_ranks, " ranks");
    Row& row = rows.emplace_back(all[rank]);
    std::erase_if(row.activity.steps, [this](const ActiveStep& step) {
      return step.interval->begin >= end || step.interval->end <= begin || step.interval->begin == step.interval->end;
    });
    for (auto* intervals : {&row.nodes, &row.collectives, &row.transfers, &row.reductions}) sort_by_begin(*intervals);
    lanes = lanes || !row.nodes.empty() || !row.collectives.empty();
    transfers = transfers || !row.transfers.empty();
    reductions = reductions || !row.reductions.empty();
  }
}

planner::Window Picture::shown(const Interval& interval) const {
  return {std::clamp(interval.begin, begin, end), std::clamp(interval.end, begin, end)};
}

std::string Picture::shades() const {
  if (!second_halves) return "";
  // In DualPipe each direction has micro-batches of its own, and as many stages as ranks; pipelines may lie side by
  // side.
  bool apart = true;
  std::unordered_map<std::int64_t, int> stage_of;  // by rank and micro-batch
  for (const Row& row : rows)
    for (const ActiveStep& step : row.activity.steps) {
      const Op& op = step.interval->step.op;
      const auto [found, is_new] = stage_of.try_emplace(op.micro_batch * num_ranks + row.rank, op.stage);
      apart = apart && found->second == op.stage;
    }
  if (!apart) return "dark: first stage of the rank, light: its other stages";
  if (num_stages == num_ranks) return str("dark: entered at rank 0, light: entered at rank ", num_ranks - 1);
  return "dark: entered at the first rank of a pipeline, light: entered at the last";
}

double round_step(double least) {
  const double power = std::pow(10.0, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (factor * power >= least * (1 - 1e-9)) return factor * power;
  return 10 * power;
}

std::string number(double value) { return str(std::abs(value) < 1e-12 ? 0.0 : value); }

std::string node_label(const Interval& interval) {
  const Pass pass = interval.step.op.pass;
  return interval.node + (interval.node.empty() ? "" : "-") +
         static_cast<char>(pass == Pass::BackwardInput ? Pass::Backward : pass);
}

Op colored_op(const Interval& interval) {
  Op op = interval.step.op;
  if (interval.lane == Lane::collective && op.pass == Pass::Backward) op.pass = Pass::BackwardInput;
  return op;
}

}  // namespace dualpipe::detail
