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
  std::int64_t step = 0;  ///< number of training steps begun before
  bool training = true;   ///< false in evaluate and predict
  const Tensors& extras;  ///< side inputs of this micro-batch (Batch::extras), the same on every stage
};

/// Ordinary autograd code from tensors to tensors.
using Compute = std::function<Tensors(const Tensors& inputs, const StageContext& context)>;

/// One micro-batch that went forward through a stage and waits for its backward. Output gradients are one per output,
/// or the single gradient of the loss (a tensor without dimensions) where there was one.
struct StageActivation {
  Tensors outputs;  ///< detached, each with the requires_grad of what the stage returned (false outside of training)
  BackwardGraph graph;  ///< of the outputs, or of the loss where there was one; empty outside of training
  at::Tensor loss;      ///< detached, without dimensions; undefined without loss function
  bool split = true;    ///< false: I does the whole backward, W nothing

  Tensors backward(const Tensors& output_gradients);        ///< B, see BackwardGraph
  Tensors backward_input(const Tensors& output_gradients);  ///< I
  void backward_weight();                                   ///< W, to be called after every I, whether split or not
};

/// What a stage computes, and the module that owns its parameters.
class Stage {
 public:
  /// @param module  owner of the parameters and buffers; null: none.
  explicit Stage(std::shared_ptr<torch::nn::Module> module = nullptr);

  /// Adds a node of ordinary autograd code. Nodes run one after the other, each taking what the one before returned; a
  /// stage without nodes returns its inputs.
  ///
  /// @throws InvalidArgument  a null function.
  Stage& compute(std::string name, Compute compute);
  /// Adds the nodes of `next` behind the own ones, their names prefixed `name.`; not its module, of which there may be
  /// one only. The whole splits its backward only where both did, and takes what `next` took where it had no nodes
  /// before.
  Stage& append(const std::string& name, const Stage& next);
  /// false: all of the backward in I, nothing in W, for backwards that keep state or draw random numbers. Default true.
  Stage& split_backward(bool split);
  /// Number of tensors the stage takes, where known; a micro-batch with another number is an error before user code
  /// runs.
  Stage& takes(int num_inputs);

  const std::shared_ptr<torch::nn::Module>& module() const noexcept { return module_; }
  bool splits_backward() const noexcept { return split_; }
  std::vector<std::string> node_names() const;

  /// Runs one micro-batch on the calling thread, with gradients enabled in training and disabled otherwise. What user
  /// code throws comes through as it is.
  ///
  /// @param inputs  as received: detached, requires_grad() saying which are differentiable; may be undefined.
  /// @param loss    last stage: from the stage's outputs to a floating-point tensor of one element; null elsewhere. Its
  /// gradients
  ///                flow through the same graph.
  /// @throws InvalidArgument  another number of inputs than the stage takes, a loss that is not one floating-point
  /// element.
  StageActivation forward(const Tensors& inputs, const StageContext& context,
                          const std::function<at::Tensor(const Tensors&)>& loss = nullptr) const;

 private:
  struct Node {
    std::string name;
    Compute compute;
  };

  std::shared_ptr<torch::nn::Module> module_;
  std::vector<Node> nodes_;
  bool split_ = true;
  std::optional<int> num_inputs_;
};

using StageFactory = std::function<Stage(int stage)>;

}  // namespace dualpipe
