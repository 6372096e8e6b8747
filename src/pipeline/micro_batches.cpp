#include "dualpipe/detail/pipeline/micro_batches.hpp"

#include <ATen/ATen.h>

#include <utility>

namespace dualpipe {

void MicroBatches::put(Payload payload, int stage, int micro_batch, Tensors tensors) {
  Slot& here = slots_[place(stage, micro_batch)];
  (payload == Payload::activation ? here.inputs : here.gradients) = std::move(tensors);
}

void MicroBatches::start_forward(const Op& op, std::optional<ForwardPass>& pass) {
  Slot& here = slot(op);
  const RunInputs& run = context_.inputs;
  Tensors inputs = op.stage == 0 ? batch_inputs(op) : std::move(here.inputs);
  if (run.training && op.stage > 0)
    for (const at::Tensor& input : inputs) {
      const bool differentiable = input.defined() && input.requires_grad();
      here.differentiable_inputs.push_back(differentiable ? std::optional<torch::autograd::InputMetadata>(input)
                                                          : std::nullopt);
    }
  const StageContext context{op.stage, op.micro_batch, run.step, run.training, batch(op).extras};
  StageLoss loss;
  if (context_.last(op) && run.loss)
    loss = [this, op](const Tensors& outputs) { return context_.inputs.loss(outputs, batch(op).targets); };
  pass.emplace(context_.stage_of(op), std::move(inputs), context, std::move(loss));
}

Tensors MicroBatches::end_forward(const Op& op, ForwardPass& pass) {
  StageActivation activation = pass.take();
  if (context_.last(op)) {
    if (activation.loss.defined()) outputs_.losses[op.micro_batch] = activation.loss;
    if (context_.inputs.keep_outputs)
      for (const at::Tensor& output : activation.outputs)
        outputs_.outputs[op.micro_batch].push_back(output.defined() ? output.detach() : output);
  }
  Tensors results = std::move(activation.outputs);
  if (context_.inputs.training) {
    Slot& here = slot(op);
    for (const at::Tensor& result : results) here.differentiable.push_back(result.defined() && result.requires_grad());
    here.activation = std::move(activation);
  } else {
    forget(op);
  }
  return results;
}

void MicroBatches::start_backward(const Op& op, std::optional<BackwardPass>& pass, bool communicates) {
  Slot& here = slot(op);
  // Splitting pays only where somebody waits for the input gradient, or a collective for a pause of the host.
  const bool whole = op.pass == Pass::Backward && !communicates && (!context_.early() || op.stage == 0);
  pass.emplace(here.activation, output_gradients(op, here), whole);
}

Tensors MicroBatches::end_backward(const Op& op, BackwardPass& pass) {
  Tensors input_gradients = pass.take();
  return op.stage > 0 ? travelling(slot(op), std::move(input_gradients)) : Tensors();
}

/// One gradient per thing that the stage's graph ends in: the loss, or each output.
Tensors MicroBatches::output_gradients(const Op& op, Slot& here) const {
  if (context_.last(op)) {
    if (here.activation.loss.defined()) return {at::full_like(here.activation.loss, context_.inputs.loss_scale)};
    return Tensors(here.differentiable.size());
  }
  Tensors gradients;
  std::size_t next = 0;
  for (const bool differentiable : here.differentiable) {
    DUALPIPE_CHECK(!differentiable || next < here.gradients.size(), "stage ", op.stage + 1, " returned ",
                   here.gradients.size(), " gradients for the outputs of stage ", op.stage, ", which has more");
    gradients.push_back(differentiable ? std::move(here.gradients[next++]) : at::Tensor());
  }
  here.gradients.clear();
  return gradients;
}

/// The gradients that travel: one per input that requires grad; where nothing flowed, zeros.
Tensors MicroBatches::travelling(const Slot& here, Tensors input_gradients) {
  Tensors gradients;
  for (std::size_t i = 0; i < here.differentiable_inputs.size(); ++i) {
    if (!here.differentiable_inputs[i]) continue;
    at::Tensor gradient = std::move(input_gradients[i]);
    gradients.push_back(gradient.defined() ? gradient : here.differentiable_inputs[i]->zeros_like());
  }
  return gradients;
}

const Batch& MicroBatches::batch(const Op& op) const {
  const std::vector<Batch>& batches = context_.inputs.micro_batches;
  return batches.empty() ? no_batch_ : batches[op.micro_batch];
}

/// Copies, so that in-place code at the start of the first stage does not write into the caller's batch. The host does
/// not wait for a copy to a device, which reads the batch before the step is over.
Tensors MicroBatches::batch_inputs(const Op& op) const {
  Tensors inputs;
  for (const at::Tensor& input : batch(op).inputs)
    inputs.push_back(input.detach().to(context_.communicator.device(), input.scalar_type(), /*non_blocking=*/true,
                                       /*copy=*/true));
  return inputs;
}

}  // namespace dualpipe
