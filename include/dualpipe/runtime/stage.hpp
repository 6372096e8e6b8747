#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/runtime/split_backward.hpp"

namespace dualpipe {

/// Which run of a stage this is.
struct StageContext {
  int stage = 0;
  int micro_batch = 0;
  std::int64_t step = 0;       ///< number of training steps begun before
  bool training = true;        ///< false in evaluate and predict
  const Tensors& extras;       ///< side inputs of this micro-batch (Batch::extras), the same on every stage
};

/// Ordinary autograd code from tensors to tensors.
using Compute = std::function<Tensors(const Tensors& inputs, const StageContext& context)>;

/// One micro-batch that went forward through a stage and waits for its backward.
struct StageActivation {
  Tensors outputs;      ///< detached, each with the requires_grad of what the stage returned
  BackwardGraph graph;  ///< of the outputs, or of the loss where there was one
  at::Tensor loss;      ///< detached; undefined without loss function
  bool split = true;    ///< false: I does the whole backward, W nothing
  Tensors backward(const Tensors& output_gradients);
  Tensors backward_input(const Tensors& output_gradients);
  void backward_weight();
};

/// What a stage computes, and the module that owns its parameters.
class Stage {
 public:
  /// @param module  owner of the parameters and buffers; null: none.
  explicit Stage(std::shared_ptr<torch::nn::Module> module = nullptr);

  /// Adds a node of ordinary autograd code. Nodes run one after the other, each taking what the one before returned.
  Stage& compute(std::string name, Compute compute);
  /// false: all of the backward in I, nothing in W, for backwards that keep state or draw random numbers. Default true.
  Stage& split_backward(bool split);
  /// Number of tensors the stage takes, where known; a micro-batch with another number is an error before user code runs.
  Stage& takes(int num_inputs);

  const std::shared_ptr<torch::nn::Module>& module() const noexcept;
  bool splits_backward() const noexcept;

  /// @param inputs  as received: detached, requires_grad() saying which are differentiable.
  /// @param loss    last stage: from the stage's outputs to a tensor of one element; null elsewhere.
  /// @throws InvalidArgument  another number of inputs than the stage takes, a null node, a loss that is not one element.
  StageActivation forward(const Tensors& inputs, const StageContext& context, const std::function<at::Tensor(const Tensors&)>& loss = nullptr) const;

 private:
  std::shared_ptr<torch::nn::Module> module_;
  std::vector<std::pair<std::string, Compute>> nodes_;
  bool split_ = true;
  std::optional<int> num_inputs_;
};

using StageFactory = std::function<Stage(int stage)>;

// as_stage(module): in this header too (template): a torch::nn::ModuleHolder or a shared_ptr to a module whose forward takes tensors, or
// Tensors, and returns a tensor, Tensors or a std::tuple of tensors: one compute node named "forward". takes() is set from forward's arity.

}  // namespace dualpipe
