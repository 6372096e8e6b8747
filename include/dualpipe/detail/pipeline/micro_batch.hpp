#pragma once

#include <torch/csrc/autograd/input_metadata.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/store.hpp"
#include "dualpipe/stage/stage_run.hpp"

namespace dualpipe::detail {

/// One micro-batch on one stage, and what of it crosses the stage's boundaries: activations whole, and one gradient for
/// each of them that requires grad.
class MicroBatch {
 public:
  /// @param shared  see StageRun.
  DUALPIPE_DECL MicroBatch(const Stage& stage, const Tensors& inputs, const StageContext& context, StageLoss loss,
                           SharedPairs shared);

  StageRun& run() { return run_; }

  /// @return what goes to the next stage.
  DUALPIPE_DECL Tensors finish_forward();
  /// @param gradients   from the next stage; none on the last one, and where nothing flows in.
  /// @param loss_scale  the gradient that enters the loss, where there is one, and added losses; 0: nothing enters,
  ///                    whatever the loss is.
  /// @param whole       see StageRun::start_backward.
  DUALPIPE_DECL void start_backward(std::optional<Tensors> gradients, double loss_scale, bool whole);
  /// @return those of the inputs that require grad; zeros where nothing flowed.
  DUALPIPE_DECL Tensors finish_backward();

 private:
  StageRun run_;
  std::vector<std::optional<torch::autograd::InputMetadata>> inputs_;  // of those that require grad
  std::vector<bool> differentiable_;                                   // by output
};

/// The micro-batches of a rank between their passes, by stage and micro-batch.
using MicroBatches = Store<std::pair<int, int>, std::unique_ptr<MicroBatch>>;

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/micro_batch.ipp"
#endif
