#pragma once

#include <torch/csrc/autograd/input_metadata.h>

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "dualpipe/detail/pipeline/context.hpp"

namespace dualpipe {

/// What a rank holds of the micro-batches on its stages, from the arrival of their inputs to the end of their
/// backward, and what each pass takes from it and leaves in it.
class MicroBatches {
 public:
  explicit MicroBatches(const RunContext& context) : context_(context) {}

  /// What the neighbour of a stage has handed to it.
  void put(Payload payload, int stage, int micro_batch, Tensors tensors);

  void start_forward(const Op& op, std::optional<ForwardPass>& pass);
  /// @return what goes to the next stage.
  Tensors end_forward(const Op& op, ForwardPass& pass);

  /// Of a training run.
  bool is_forward_over(const Op& op) const {
    const auto found = slots_.find(place(op.stage, op.micro_batch));
    return found != slots_.end() && !found->second.activation.nodes.empty();
  }

  /// B, or I of a micro-batch whose W comes as an op of its own.
  void start_backward(const Op& op, std::optional<BackwardPass>& pass, bool communicates);
  /// @return what goes to the stage before, if there is one.
  Tensors end_backward(const Op& op, BackwardPass& pass);

  /// All weight parts of an I that is over.
  StageActivation& activation(const Op& op) { return slot(op).activation; }
  void forget(const Op& op) { slots_.erase(place(op.stage, op.micro_batch)); }

  RunOutputs& outputs() { return outputs_; }

 private:
  /// One micro-batch on one stage.
  struct Slot {
    Tensors inputs;     // waiting for F
    Tensors gradients;  // waiting for B or I; one per output that requires grad
    StageActivation activation;
    std::vector<bool> differentiable;  // outputs that require grad
    std::vector<std::optional<torch::autograd::InputMetadata>> differentiable_inputs;
  };

  std::int64_t place(int stage, int micro_batch) const {
    return static_cast<std::int64_t>(stage) * context_.plan.schedule.num_micro_batches + micro_batch;
  }
  Slot& slot(const Op& op) { return slots_[place(op.stage, op.micro_batch)]; }

  const Batch& batch(const Op& op) const;
  Tensors batch_inputs(const Op& op) const;
  Tensors output_gradients(const Op& op, Slot& here) const;
  static Tensors travelling(const Slot& here, Tensors input_gradients);

  const RunContext& context_;
  const Batch no_batch_;
  std::unordered_map<std::int64_t, Slot> slots_;
  RunOutputs outputs_;
};

}  // namespace dualpipe
