#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <vector>

namespace dualpipe {

using Tensors = std::vector<at::Tensor>;

/// The entrance of one micro-batch into a graph of its own.
struct GraphInputs {
  Tensors tensors;                    ///< what user code sees: shares memory (and, where there is one, the version counter) with the tensor entered; never a leaf where it requires grad, so in-place code works
  torch::autograd::edge_list edges;   ///< where its gradient leaves the graph; invalid for a tensor without requires_grad
};
/// Enters `inputs` (detached or fresh; requires_grad() says which are differentiable; undefined ones stay undefined).
GraphInputs enter_graph(const Tensors& inputs);

/// The backward of one micro-batch through one piece of autograd code, as a whole or as its input and its weight part: input gradients
/// first, weight gradients later, for any graph, found from the graph alone.
///
/// Exact for backwards that are pure functions of their gradients and saved tensors. Backward runs on the calling thread.
class BackwardGraph {
 public:
  BackwardGraph() = default;
  /// @param inputs   the edges that enter_graph gave.
  /// @param outputs  what user code returned; only their gradient edges are kept, so the tensors may be dropped.
  BackwardGraph(torch::autograd::edge_list inputs, const Tensors& outputs);

  /// B: input gradients (undefined where no input edge or nothing flowed) and all parameter gradients accumulated, in one engine call.
  /// @param output_gradients  one per output; undefined: nothing flows into it.
  Tensors backward(const Tensors& output_gradients);
  /// I: the input gradients; no parameter's gradient is touched. What only the input gradients needed is freed.
  Tensors backward_input(const Tensors& output_gradients);
  /// W: accumulates what backward_input left; each parameter's accumulator runs once. Frees the rest of the graph.
  void backward_weight();

 private:
  torch::autograd::edge_list inputs_;
  torch::autograd::edge_list outputs_;           // invalid edge: output without grad
  torch::autograd::edge_list deferred_;          // roots of the weight part
  torch::autograd::variable_list deferred_gradients_;
};

}  // namespace dualpipe
