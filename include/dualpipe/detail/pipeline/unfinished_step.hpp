#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/detail/config.hpp"

namespace dualpipe::detail {

/// The loss of a step, of the losses of its micro-batches.
///
/// @param weights  of the losses, float64; those of weight 0 do not count, whatever they are. Undefined: all are 1.
DUALPIPE_DECL at::Tensor reduced(const at::Tensor& losses, LossReduction reduction, const at::Tensor& weights);

/// A step that was committed before its device had finished it.
class UnfinishedStep {
 public:
  /// @param end     over when the device has finished the step.
  /// @param loss    set by finish().
  /// @param losses  in memory of the host; valid at the end.
  /// @param weights  as in reduced().
  /// @param finding  called at the end: what of the step is not finite; may be null.
  DUALPIPE_DECL UnfinishedStep(Pending end, LossReduction reduction, at::Tensor loss, at::Tensor losses,
                               at::Tensor weights, std::function<std::string()> finding);

  /// Waits for the end, then sets the loss.
  ///
  /// @throws CommError  the device has failed.
  /// @throws Error      what was found, each time.
  DUALPIPE_DECL void finish();
  /// Does not wait. @throws CommError  it has failed.
  DUALPIPE_DECL void check();

 private:
  Pending end_;  // empty after finish()
  LossReduction reduction_;
  at::Tensor loss_, losses_, weights_;
  std::function<std::string()> finding_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/unfinished_step.ipp"
#endif
