#include "dualpipe/planner/report.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <unordered_set>
#include <utility>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/error.hpp"
#include "planner/spans.hpp"

namespace dualpipe::planner {
namespace {

using detail::Activity;
using detail::clipped;
using detail::length;
using detail::TimeSpans;

/// Forwards held at once by a rank whose steps are given in order.
int peak_activations(const std::vector<detail::ActiveStep>& steps) {
  int held = 0, peak = 0;
  const auto run = [&](const Op& op) {
    if (op.pass == Pass::Forward) peak = std::max(peak, ++held);
    if (detail::is_backward(op.pass)) held = std::max(0, held - 1);
  };
  for (const auto& [interval, whole] : steps) detail::visit_ops(interval->step, run);
  return peak;
}

Overlap overlap(const TimeSpans& communication, const TimeSpans& computing) {
  return {.hidden = length(detail::common(communication, computing)),
          .exposed = length(detail::without(communication, computing))};
}

/// @param last  up to when sums of gradients count.
Report report_of(const std::vector<Activity>& ranks, const Window& window, double last) {
  Report result{.makespan = std::max(0.0, window.length()), .ranks = {}};
  for (const Activity& rank : ranks) {
    RankReport& out = result.ranks.emplace_back();
    out.rank = static_cast<int>(result.ranks.size()) - 1;
    for (const auto& [step, whole] : rank.steps)
      out.busy += std::max(0.0, std::min(step->end, window.end) - std::max(step->begin, window.begin));
    const TimeSpans computing = clipped(rank.computing, window);
    out.compute = length(computing);
    out.collectives = overlap(clipped(rank.collectives, window), computing);
    out.transfers = overlap(clipped(rank.transfers, window), computing);
    out.reductions = overlap(clipped(rank.reductions, {window.begin, last}), computing);
    out.bubble = std::max(0.0, result.makespan - out.compute - out.collectives.exposed);
    out.peak_activations = peak_activations(rank.steps);
  }
  return result;
}

/// The longest run of pairs, from its first begin to its last end.
std::optional<Window> run_of_pairs(const Activity& rank) {
  constexpr int least = 2;
  std::optional<Window> longest;
  for (std::size_t i = 0, best = least; i < rank.steps.size(); ++i) {
    std::size_t end = i;
    while (end < rank.steps.size() && rank.steps[end].interval->step.overlapped) ++end;
    if (end - i >= best) {
      best = end - i + 1;
      longest = {rank.steps[i].interval->begin, rank.steps[end - 1].interval->end};
    }
    i = end;
  }
  return longest;
}

/// Calls `f` with each number of a usage and its counterpart in others.
template <class F>
void each_number(const F& f) {
  f([](auto& usage) -> auto& { return usage.busy; });
  f([](auto& usage) -> auto& { return usage.compute; });
  f([](auto& usage) -> auto& { return usage.bubble; });
  f([](auto& usage) -> auto& { return usage.collectives.hidden; });
  f([](auto& usage) -> auto& { return usage.collectives.exposed; });
  f([](auto& usage) -> auto& { return usage.transfers.hidden; });
  f([](auto& usage) -> auto& { return usage.transfers.exposed; });
  f([](auto& usage) -> auto& { return usage.reductions.hidden; });
  f([](auto& usage) -> auto& { return usage.reductions.exposed; });
}

}  // namespace

Usage Report::total() const {
  Usage sum;
  for (const Usage& rank : ranks) each_number([&](const auto& number) { number(sum) += number(rank); });
  return sum;
}

Window extent(const Timeline& timeline) {
  Window window{std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
  for (const Interval& interval : timeline.intervals) {
    if (interval.lane != Lane::compute) continue;
    window = {std::min(window.begin, interval.begin), std::max(window.end, interval.end)};
  }
  return window.begin <= window.end ? window : Window{};
}

std::optional<Window> main_part(const Timeline& timeline) {
  std::optional<Window> common;
  for (const Activity& rank : detail::activities(timeline)) {
    const std::optional<Window> run = run_of_pairs(rank);
    if (!run) return std::nullopt;
    common = common ? Window{std::max(common->begin, run->begin), std::min(common->end, run->end)} : *run;
  }
  if (common && common->begin >= common->end) common.reset();
  return common;
}

Report report(const Timeline& timeline) {
  return report_of(detail::activities(timeline), extent(timeline), std::numeric_limits<double>::infinity());
}

Report report(const Timeline& timeline, const Window& window) {
  return report_of(detail::activities(timeline), window, window.end);
}

std::vector<Timeline> split_steps(const Timeline& timeline) {
  // For each step the begin of the first rank and the end of the last one.
  std::vector<double> begins, ends;
  for (const Activity& rank : detail::activities(timeline)) {
    std::unordered_set<Op> seen;
    std::size_t step = 0;
    for (const auto& [interval, whole] : rank.steps) {
      if (!seen.insert(interval->step.op).second) {
        seen = {interval->step.op};
        ++step;
      }
      if (step == ends.size()) {
        begins.push_back(interval->begin);
        ends.push_back(interval->end);
      }
      begins[step] = std::min(begins[step], interval->begin);
      ends[step] = std::max(ends[step], interval->end);
    }
  }
  if (ends.size() <= 1) return {timeline};
  std::vector<Timeline> result;
  for (std::size_t step = 0; step < ends.size(); ++step)
    result.push_back(
        {detail::str(timeline.name, timeline.name.empty() ? "" : ", ", "step ", step + 1, " of ", ends.size()),
         timeline.num_ranks,
         timeline.seconds_per_unit,
         {}});
  for (const Interval& interval : timeline.intervals) {
    std::size_t step = 0;
    // Sums of gradients may begin behind the last computing of their step.
    const auto over = [&] {
      return interval.lane == Lane::reduction ? interval.begin >= begins[step + 1] : interval.begin >= ends[step];
    };
    while (step + 1 < ends.size() && over()) ++step;
    result[step].intervals.push_back(interval);
  }
  return result;
}

Report median(const std::vector<Report>& reports) {
  DUALPIPE_CHECK(!reports.empty(), "the median of no report");
  for (const Report& report : reports)
    DUALPIPE_CHECK(report.ranks.size() == reports.front().ranks.size(), "reports of ", reports.front().ranks.size(),
                   " and ", report.ranks.size(), " ranks have no common median");
  std::vector<double> values(reports.size());
  const auto median_of = [&](const auto& number) {
    std::transform(reports.begin(), reports.end(), values.begin(), number);
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>((values.size() - 1) / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
  };
  Report result = reports.front();
  result.makespan = median_of([](const Report& report) { return report.makespan; });
  for (std::size_t rank = 0; rank < result.ranks.size(); ++rank) {
    each_number([&](const auto& number) {
      number(result.ranks[rank]) = median_of([&](const Report& report) { return number(report.ranks[rank]); });
    });
    result.ranks[rank].peak_activations =
        static_cast<int>(median_of([&](const Report& report) { return report.ranks[rank].peak_activations; }));
  }
  return result;
}

}  // namespace dualpipe::planner
