#pragma once

#include <utility>
#include <vector>

#include "dualpipe/planner/report.hpp"

namespace dualpipe::detail {

using TimeSpan = std::pair<double, double>;
/// Sorted and disjoint.
using TimeSpans = std::vector<TimeSpan>;

TimeSpans merged(TimeSpans spans);
double length(const TimeSpans& spans);
TimeSpans clipped(const TimeSpans& spans, const planner::Window& window);
/// What lies in both.
TimeSpans common(const TimeSpans& a, const TimeSpans& b);
/// What lies in `a` only.
TimeSpans without(const TimeSpans& a, const TimeSpans& b);

/// A step, and whether it computes from begin to end: what is known by its nodes computes only where they do.
struct ActiveStep {
  const Interval* interval = nullptr;
  bool whole = true;
};

/// What one rank does when.
struct Activity {
  std::vector<ActiveStep> steps;  ///< its lane compute, by begin
  TimeSpans computing;
  TimeSpans collectives;
  TimeSpans transfers;
  TimeSpans reductions;
};

/// By rank. The timeline must outlive it. Throws InvalidArgument on a rank that the timeline does not have.
std::vector<Activity> activities(const Timeline& timeline);

}  // namespace dualpipe::detail
