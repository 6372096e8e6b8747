#include "dualpipe/stage/stage_pass.hpp"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <utility>

namespace dualpipe {
namespace {

/// What leaves a graph: same memory, no history.
Tensors detach_outputs(const Tensors& outputs, bool training) {
  Tensors result;
  result.reserve(outputs.size());
  for (const auto& output : outputs) {
    result.push_back(output.defined() ? output.detach() : output);
    if (training && output.defined() && output.requires_grad()) result.back().set_requires_grad(true);
  }
  return result;
}

/// One loss without dimensions, so that its gradient is a plain number whatever the loss function makes of it.
at::Tensor compute_loss(const StageLoss& loss_function, const Tensors& outputs, int stage) {
  at::Tensor loss = loss_function(outputs);
  DUALPIPE_CHECK(loss.defined(), "the loss function of stage ", stage, " returned an undefined tensor");
  DUALPIPE_CHECK(loss.numel() == 1, "the loss of stage ", stage, " must be one element, got sizes ", loss.sizes(),
                 "; reduce it, for instance with mean()");
  DUALPIPE_CHECK(loss.is_floating_point(), "the loss of stage ", stage, " must be floating point, got ",
                 loss.scalar_type());
  return loss.dim() == 0 ? loss : loss.reshape({});
}

/// Takes out what a collective moves.
Tensors take_moved(Tensors& values, const std::vector<int>& moves) {
  Tensors moved;
  for (const int position : moves) {
    DUALPIPE_CHECK(static_cast<std::size_t>(position) < values.size(), "the collective moves the tensor at position ",
                   position, ", but it is given ", values.size(), values.size() == 1 ? " tensor" : " tensors");
    moved.push_back(std::exchange(values[static_cast<std::size_t>(position)], at::Tensor()));
  }
  return moved;
}

/// Waits, and puts what comes back into the places of what was taken.
void put_moved(Tensors& values, const std::vector<int>& moves, Pending pending, const char* what) {
  Tensors moved = pending.take();
  DUALPIPE_CHECK(moved.size() == moves.size(), "the collective moves ", moves.size(), " tensors, but its ", what,
                 " gave ", moved.size());
  for (std::size_t i = 0; i < moves.size(); ++i) values[static_cast<std::size_t>(moves[i])] = std::move(moved[i]);
}

}  // namespace

ForwardPass::ForwardPass(const Stage& stage, Tensors inputs, const StageContext& context, StageLoss loss)
    : stage_(&stage),
      context_(context),
      loss_(std::move(loss)),
      num_nodes_(static_cast<int>(stage.structure(loss_ != nullptr).size())),
      values_(std::move(inputs)) {
  DUALPIPE_CHECK(!stage.num_inputs_ || values_.size() == static_cast<std::size_t>(*stage.num_inputs_), "stage ",
                 context.stage, " takes ", *stage.num_inputs_, *stage.num_inputs_ == 1 ? " tensor" : " tensors",
                 ", got ", values_.size(), " (micro-batch ", context.micro_batch, ")");
  result_.split = stage.split_;
  result_.nodes.reserve(static_cast<std::size_t>(num_nodes_));
}

void ForwardPass::advance() {
  settle();
  const c10::AutoGradMode grad_mode(context_.training);
  const auto index = static_cast<std::size_t>(next_++);
  const Stage::Segment segment = index < stage_->chain_.size() ? stage_->chain_[index] : Stage::Segment{};
  if (segment.begin < segment.end && stage_->nodes_[segment.begin].communication) {
    communicate(stage_->nodes_[segment.begin]);
  } else {
    compute(segment.begin, segment.end);
  }
}

void ForwardPass::compute(std::size_t begin, std::size_t end) {
  const GraphInputs entered = enter_graph(values_);
  values_ = entered.tensors;
  for (std::size_t i = begin; i < end; ++i) {
    at_ = stage_->nodes_[i].name;
    values_ = stage_->nodes_[i].compute(values_, context_);
  }
  auto& node = result_.nodes.emplace_back();
  if (loss_ && advanced()) {
    const at::Tensor value = compute_loss(loss_, values_, context_.stage);
    result_.loss = value.detach();
    if (context_.training) node.graph = BackwardGraph(entered, {value});
  } else if (context_.training) {
    node.graph = BackwardGraph(entered, values_);
  }
  values_ = detach_outputs(values_, context_.training);
}

void ForwardPass::communicate(const Stage::Node& node) {
  at_ = node.name;
  auto launched = node.communication->collective->forward(take_moved(values_, node.communication->moves), context_);
  DUALPIPE_CHECK(launched.pending, "the collective launched nothing: its Pending is empty");
  pending_ = std::move(launched.pending);
  moving_ = node.communication.get();
  result_.nodes.push_back({{}, node.communication, context_.training ? std::move(launched.handle) : nullptr, false});
}

void ForwardPass::settle() {
  if (!pending_) return;
  put_moved(values_, moving_->moves, std::exchange(pending_, {}), "forward");
}

StageActivation ForwardPass::take() {
  settle();
  // What a collective gave at the end says of itself whether it is differentiable.
  const bool computed = !result_.nodes.back().communication;
  result_.outputs = computed ? std::move(values_) : detach_outputs(values_, context_.training);
  return std::move(result_);
}

BackwardPass::BackwardPass(StageActivation& activation, Tensors output_gradients, bool whole_first)
    : activation_(&activation),
      whole_first_(whole_first),
      next_(static_cast<int>(activation.nodes.size()) - 1),
      gradients_(std::move(output_gradients)) {}

void BackwardPass::advance() {
  settle();
  const int index = next_--;
  auto& node = activation_->nodes[static_cast<std::size_t>(index)];
  if (node.communication) {
    moving_ = node.communication.get();
    pending_ =
        moving_->collective->backward(std::exchange(node.handle, nullptr), take_moved(gradients_, moving_->moves));
    DUALPIPE_CHECK(pending_, "the collective launched nothing in its backward: its Pending is empty");
    return;
  }
  node.whole = !activation_->split || (index == 0 && whole_first_);
  gradients_ = node.whole ? node.graph.backward(gradients_) : node.graph.backward_input(gradients_);
}

void BackwardPass::settle() {
  if (!pending_) return;
  put_moved(gradients_, moving_->moves, std::exchange(pending_, {}), "backward");
}

Tensors BackwardPass::take() {
  settle();
  return std::move(gradients_);
}

}  // namespace dualpipe
