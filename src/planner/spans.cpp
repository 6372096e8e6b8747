#include "planner/spans.hpp"

#include <algorithm>
#include <cstddef>
#include <unordered_set>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"

namespace dualpipe::detail {
namespace {

/// The side of a step that an op belongs to: I and W of a node are parts of a B.
Op side_of(Op op) {
  if (op.pass != Pass::Forward) op.pass = Pass::Backward;
  return op;
}

}  // namespace

TimeSpans merged(TimeSpans spans) {
  std::sort(spans.begin(), spans.end());
  TimeSpans result;
  for (const TimeSpan& span : spans) {
    if (!result.empty() && span.first <= result.back().second)
      result.back().second = std::max(result.back().second, span.second);
    else
      result.push_back(span);
  }
  return result;
}

double length(const TimeSpans& spans) {
  double sum = 0;
  for (const auto& [begin, end] : spans) sum += end - begin;
  return sum;
}

TimeSpans clipped(const TimeSpans& spans, const planner::Window& window) {
  TimeSpans result;
  for (const auto& [begin, end] : spans)
    if (begin < window.end && end > window.begin)
      result.emplace_back(std::max(begin, window.begin), std::min(end, window.end));
  return result;
}

TimeSpans common(const TimeSpans& a, const TimeSpans& b) {
  TimeSpans result;
  for (std::size_t i = 0, k = 0; i < a.size() && k < b.size();) {
    const double begin = std::max(a[i].first, b[k].first), end = std::min(a[i].second, b[k].second);
    if (begin < end) result.emplace_back(begin, end);
    a[i].second < b[k].second ? ++i : ++k;
  }
  return result;
}

TimeSpans without(const TimeSpans& a, const TimeSpans& b) {
  TimeSpans result;
  std::size_t k = 0;
  for (auto [begin, end] : a) {
    while (k < b.size() && b[k].second <= begin) ++k;
    for (std::size_t i = k; i < b.size() && b[i].first < end; ++i) {
      if (begin < b[i].first) result.emplace_back(begin, b[i].first);
      begin = std::max(begin, b[i].second);
    }
    if (begin < end) result.emplace_back(begin, end);
  }
  return result;
}

std::vector<Activity> activities(const Timeline& timeline) {
  struct Rank {
    Activity activity;
    std::unordered_set<Op> by_node;  // sides whose nodes the timeline shows
  };
  std::vector<Rank> ranks(std::max(0, timeline.num_ranks));
  for (const Interval& interval : timeline.intervals) {
    DUALPIPE_CHECK(interval.rank >= 0 && interval.rank < timeline.num_ranks, "an interval of rank ", interval.rank,
                   " in a timeline of ", timeline.num_ranks, " ranks");
    auto& [activity, by_node] = ranks[interval.rank];
    switch (interval.lane) {
      case Lane::compute:
        activity.steps.push_back({&interval});
        break;
      case Lane::send:
      case Lane::receive:
        activity.transfers.emplace_back(interval.begin, interval.end);
        break;
      case Lane::collective:
        activity.collectives.emplace_back(interval.begin, interval.end);
        by_node.insert(side_of(interval.step.op));
        break;
      case Lane::node:
        activity.computing.emplace_back(interval.begin, interval.end);
        by_node.insert(side_of(interval.step.op));
        break;
      case Lane::reduction:
        activity.reductions.emplace_back(interval.begin, interval.end);
        break;
    }
  }

  std::vector<Activity> result;
  for (auto& [activity, by_node] : ranks) {
    // Stable, so that steps that take no time stay in the order in which the rank ran them.
    std::stable_sort(activity.steps.begin(), activity.steps.end(),
                     [](const ActiveStep& a, const ActiveStep& b) { return a.interval->begin < b.interval->begin; });
    for (auto& [interval, whole] : activity.steps) {
      const Step& step = interval->step;
      // A weight part that is a step of its own has nothing to wait for.
      whole = step.op.pass == Pass::BackwardWeight ||
              !(by_node.contains(side_of(step.op)) || (step.overlapped && by_node.contains(side_of(*step.overlapped))));
      if (whole) activity.computing.emplace_back(interval->begin, interval->end);
    }
    activity.computing = merged(std::move(activity.computing));
    activity.collectives = merged(std::move(activity.collectives));
    activity.transfers = merged(std::move(activity.transfers));
    activity.reductions = merged(std::move(activity.reductions));
    result.push_back(std::move(activity));
  }
  return result;
}

}  // namespace dualpipe::detail
