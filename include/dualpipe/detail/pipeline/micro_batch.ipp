#pragma once

#include "dualpipe/detail/pipeline/micro_batch.hpp"

#include <ATen/ATen.h>

namespace dualpipe::detail {

MicroBatch::MicroBatch(const Stage& stage, const Tensors& inputs, const StageContext& context, StageLoss loss,
                       SharedPairs shared)
    : run_(stage, inputs, context, std::move(loss), std::move(shared)) {
  if (!context.training) return;
  for (const at::Tensor& input : inputs) {
    inputs_.emplace_back();
    if (input.defined() && input.requires_grad()) inputs_.back().emplace(input);
  }
}

Tensors MicroBatch::finish_forward() {
  run_.finish_forward();
  Tensors outputs = std::move(run_.outputs());
  for (const at::Tensor& output : outputs) differentiable_.push_back(output.defined() && output.requires_grad());
  return outputs;
}

void MicroBatch::start_backward(std::optional<Tensors> gradients, double loss_scale, bool whole) {
  if (run_.loss().defined()) {
    run_.start_backward({loss_scale == 0 ? at::Tensor() : at::full_like(run_.loss(), loss_scale)}, whole, loss_scale);
    return;
  }
  Tensors by_output(differentiable_.size());
  std::size_t next = 0;
  for (std::size_t i = 0; gradients && i < by_output.size(); ++i) {
    if (!differentiable_[i]) continue;
    DUALPIPE_CHECK(next < gradients->size(), "the next stage returned ", gradients->size(),
                   " gradients for the outputs of this one, which has more");
    by_output[i] = std::move((*gradients)[next++]);
  }
  run_.start_backward(std::move(by_output), whole, loss_scale);
}

Tensors MicroBatch::finish_backward() {
  Tensors gradients = run_.finish_backward();
  Tensors sent;
  for (std::size_t i = 0; i < inputs_.size(); ++i)
    if (inputs_[i]) sent.push_back(gradients[i].defined() ? std::move(gradients[i]) : inputs_[i]->zeros_like());
  return sent;
}

}  // namespace dualpipe::detail
