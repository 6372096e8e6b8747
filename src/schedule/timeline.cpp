#include "dualpipe/schedule/timeline.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace {

using Span = std::pair<double, double>;

/// Sorted and disjoint.
std::vector<Span> merged(std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end());
  std::vector<Span> result;
  for (const Span& span : spans) {
    if (!result.empty() && span.first <= result.back().second)
      result.back().second = std::max(result.back().second, span.second);
    else
      result.push_back(span);
  }
  return result;
}

double length(const std::vector<Span>& spans) {
  double sum = 0;
  for (const auto& [begin, end] : spans) sum += end - begin;
  return sum;
}

/// Of two lists made by merged().
double common_length(const std::vector<Span>& a, const std::vector<Span>& b) {
  double sum = 0;
  for (std::size_t i = 0, k = 0; i < a.size() && k < b.size();) {
    sum += std::max(0.0, std::min(a[i].second, b[k].second) - std::max(a[i].first, b[k].first));
    a[i].second < b[k].second ? ++i : ++k;
  }
  return sum;
}

/// Forwards held at once by a rank whose steps are given in order.
int peak_activations(const std::vector<const Interval*>& steps) {
  int held = 0, peak = 0;
  const auto run = [&](const Op& op) {
    if (op.pass == Pass::Forward) peak = std::max(peak, ++held);
    if (op.pass == Pass::Backward || op.pass == Pass::BackwardInput) held = std::max(0, held - 1);
  };
  for (const Interval* interval : steps) {
    run(interval->step.op);
    if (interval->step.overlapped) run(*interval->step.overlapped);
  }
  return peak;
}

}  // namespace

Report report(const Timeline& timeline) {
  struct Rank {
    std::vector<const Interval*> steps;
    std::vector<Span> transfers;
  };
  std::vector<Rank> ranks(static_cast<std::size_t>(std::max(0, timeline.num_ranks)));
  bool any = false;
  double first = 0, last = 0;
  for (const Interval& interval : timeline.intervals) {
    DUALPIPE_CHECK(interval.rank >= 0 && interval.rank < timeline.num_ranks, "an interval of rank ", interval.rank,
                   " in a timeline of ", timeline.num_ranks, " ranks");
    Rank& rank = ranks[interval.rank];
    if (interval.lane == Lane::send || interval.lane == Lane::receive)
      rank.transfers.emplace_back(interval.begin, interval.end);
    if (interval.lane != Lane::compute) continue;
    rank.steps.push_back(&interval);
    first = any ? std::min(first, interval.begin) : interval.begin;
    last = any ? std::max(last, interval.end) : interval.end;
    any = true;
  }

  Report result{.makespan = last - first, .ranks = {}};
  for (int index = 0; index < timeline.num_ranks; ++index) {
    Rank& rank = ranks[index];
    // Stable, so that steps that take no time stay in the order in which the rank ran them.
    std::stable_sort(rank.steps.begin(), rank.steps.end(),
                     [](const Interval* a, const Interval* b) { return a->begin < b->begin; });
    RankReport& out = result.ranks.emplace_back();
    out.rank = index;
    std::vector<Span> computing;
    for (const Interval* interval : rank.steps) {
      out.busy += interval->end - interval->begin;
      computing.emplace_back(interval->begin, interval->end);
    }
    out.bubble = result.makespan - out.busy;
    const std::vector<Span> transfers = merged(std::move(rank.transfers));
    out.communication = length(transfers);
    out.hidden = common_length(transfers, merged(std::move(computing)));
    out.peak_activations = peak_activations(rank.steps);
  }
  return result;
}

}  // namespace dualpipe
