#pragma once

#include "dualpipe/pipeline/dual_pipe.hpp"

namespace dualpipe {

at::Tensor reduced(const at::Tensor& losses, LossReduction reduction);

/// A step that was committed before its device had come to its end.
class StepResult::Unfinished {
 public:
  /// @param end     over when the device is through with the step.
  /// @param loss    set by finish().
  /// @param losses  in memory of the host, and there at the end.
  Unfinished(Pending end, LossReduction reduction, at::Tensor loss, at::Tensor losses);

  /// Returns at the end, with what the host computes of the results. @throws CommError
  void finish();
  /// Does not wait. @throws CommError  it has failed.
  void check();

 private:
  Pending end_;  // empty once it was waited for
  LossReduction reduction_;
  at::Tensor loss_, losses_;
};

}  // namespace dualpipe
