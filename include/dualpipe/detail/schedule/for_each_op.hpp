#pragma once

#include "dualpipe/schedule/op.hpp"

namespace dualpipe::detail {

/// Visits the op of a step, or both of a pair, the forward first.
template <class AnyStep, class Visit>
void for_each_op_of(AnyStep& step, const Visit& visit) {
  visit(step.op);
  if (step.overlapped) visit(*step.overlapped);
}

/// Visits all ops of a rank's steps in their order.
template <class Steps, class Visit>
void for_each_op(Steps& steps, const Visit& visit) {
  for (auto& step : steps) for_each_op_of(step, visit);
}

}  // namespace dualpipe::detail
