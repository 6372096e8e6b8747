#include "schedule/picture.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

Picture::Picture(const Timeline& timeline) : steps(static_cast<std::size_t>(std::max(0, timeline.num_ranks))) {
  double shortest = std::numeric_limits<double>::infinity();
  begin = std::numeric_limits<double>::infinity();
  end = -begin;
  for (const Interval& interval : timeline.intervals) {
    DUALPIPE_CHECK(interval.rank >= 0 && interval.rank < timeline.num_ranks, "an interval of rank ", interval.rank,
                   " in a timeline of ", timeline.num_ranks, " ranks");
    DUALPIPE_CHECK(std::isfinite(interval.begin) && std::isfinite(interval.end) && interval.begin <= interval.end,
                   to_string(interval.step), " of rank ", interval.rank, " lasts from ", interval.begin, " to ",
                   interval.end);
    if (interval.lane != Lane::compute) continue;
    begin = std::min(begin, interval.begin);
    end = std::max(end, interval.end);
    const auto see = [&](const Op& op) {
      num_micro_batches = std::max(num_micro_batches, std::int64_t{op.micro_batch} + 1);
      num_stages = std::max(num_stages, std::int64_t{op.stage} + 1);
      second_halves = second_halves || second_half(interval.rank, op);
    };
    see(interval.step.op);
    if (interval.step.overlapped) see(*interval.step.overlapped);
    if (interval.begin == interval.end) continue;
    shortest = std::min(shortest, interval.end - interval.begin);
    steps[static_cast<std::size_t>(interval.rank)].push_back(&interval);
  }
  if (begin > end) begin = end = 0;
  if (std::isfinite(shortest)) unit = std::max(shortest, (end - begin) / max_units);
  for (auto& rank : steps)
    std::stable_sort(rank.begin(), rank.end(),
                     [](const Interval* a, const Interval* b) { return a->begin < b->begin; });
}

std::string Picture::shades() const {
  if (!second_halves) return "";
  if (bidirectional()) return str("dark: entered at rank 0, light: entered at rank ", steps.size() - 1);
  return "dark: first stage of the rank, light: its other stages";
}

double round_step(double least) {
  const double power = std::pow(10.0, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (factor * power >= least * (1 - 1e-9)) return factor * power;
  return 10 * power;
}

std::string number(double value) { return str(std::abs(value) < 1e-12 ? 0.0 : value); }

const char* pass_name(Pass pass) {
  switch (pass) {
    case Pass::Forward:
      return "forward";
    case Pass::BackwardInput:
      return "backward, input part";
    case Pass::BackwardWeight:
      return "backward, weight part";
    case Pass::Backward:
      break;
  }
  return "backward";
}

}  // namespace dualpipe::detail
