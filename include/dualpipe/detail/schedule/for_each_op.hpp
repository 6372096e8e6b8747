#pragma once

#include <cstdint>

#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe::detail {

/// Visits the op of a step, or both of a pair, the forward first.
template <class AnyStep, class Visit>
void visit_ops(AnyStep& step, const Visit& visit) {
  visit(step.op);
  if (step.overlapped) visit(*step.overlapped);
}

/// Visits all ops of a rank's steps in their order.
template <class Steps, class Visit>
void for_each_op(Steps& steps, const Visit& visit) {
  for (auto& step : steps) visit_ops(step, visit);
}

inline std::int64_t count_ops(const Schedule& schedule) {
  std::int64_t ops = 0;
  for (const auto& steps : schedule.ranks) for_each_op(steps, [&](const Op&) { ++ops; });
  return ops;
}

}  // namespace dualpipe::detail
