#include "dualpipe/runtime/stage.hpp"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <utility>

namespace dualpipe {
namespace {

/// What leaves the graph: same memory, no history.
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
at::Tensor compute_loss(const std::function<at::Tensor(const Tensors&)>& loss_function, const Tensors& outputs,
                        int stage) {
  at::Tensor loss = loss_function(outputs);
  DUALPIPE_CHECK(loss.defined(), "the loss function of stage ", stage, " returned an undefined tensor");
  DUALPIPE_CHECK(loss.numel() == 1, "the loss of stage ", stage, " must be one element, got sizes ", loss.sizes(),
                 "; reduce it, for instance with mean()");
  DUALPIPE_CHECK(loss.is_floating_point(), "the loss of stage ", stage, " must be floating point, got ",
                 loss.scalar_type());
  return loss.dim() == 0 ? loss : loss.reshape({});
}

}  // namespace

Tensors StageActivation::backward(const Tensors& output_gradients) { return graph.backward(output_gradients); }

Tensors StageActivation::backward_input(const Tensors& output_gradients) {
  return split ? graph.backward_input(output_gradients) : graph.backward(output_gradients);
}

void StageActivation::backward_weight() {
  if (split) graph.backward_weight();
}

Stage::Stage(std::shared_ptr<torch::nn::Module> module) : module_(std::move(module)) {}

Stage& Stage::compute(std::string name, Compute compute) {
  DUALPIPE_CHECK(compute != nullptr, "node '", name, "' of a stage has no function");
  nodes_.push_back({std::move(name), std::move(compute)});
  return *this;
}

Stage& Stage::append(const std::string& name, const Stage& next) {
  if (nodes_.empty()) num_inputs_ = next.num_inputs_;
  split_ = split_ && next.split_;
  nodes_.reserve(nodes_.size() + next.nodes_.size());
  for (std::size_t i = 0, count = next.nodes_.size(); i < count; ++i) {
    nodes_.push_back({name + "." + next.nodes_[i].name, next.nodes_[i].compute});
  }
  return *this;
}

Stage& Stage::split_backward(bool split) {
  split_ = split;
  return *this;
}

Stage& Stage::takes(int num_inputs) {
  DUALPIPE_CHECK(num_inputs >= 0, "a stage cannot take ", num_inputs, " tensors");
  num_inputs_ = num_inputs;
  return *this;
}

std::vector<std::string> Stage::node_names() const {
  std::vector<std::string> names;
  for (const auto& node : nodes_) names.push_back(node.name);
  return names;
}

StageActivation Stage::forward(const Tensors& inputs, const StageContext& context,
                               const std::function<at::Tensor(const Tensors&)>& loss) const {
  DUALPIPE_CHECK(!num_inputs_ || inputs.size() == static_cast<std::size_t>(*num_inputs_), "stage ", context.stage,
                 " takes ", *num_inputs_, *num_inputs_ == 1 ? " tensor" : " tensors", ", got ", inputs.size(),
                 " (micro-batch ", context.micro_batch, ")");
  const c10::AutoGradMode grad_mode(context.training);
  const GraphInputs entered = enter_graph(inputs);
  // Nodes that follow one another without a collective between them share one graph.
  Tensors values = entered.tensors;
  for (const auto& node : nodes_) values = node.compute(values, context);

  StageActivation result;
  result.split = split_;
  if (loss) {
    const at::Tensor value = compute_loss(loss, values, context.stage);
    result.loss = value.detach();
    if (context.training) result.graph = BackwardGraph(entered, {value});
  } else if (context.training) {
    result.graph = BackwardGraph(entered, values);
  }
  result.outputs = detach_outputs(values, context.training);
  return result;
}

}  // namespace dualpipe
