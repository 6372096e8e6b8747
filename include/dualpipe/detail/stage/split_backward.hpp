#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <cstddef>
#include <vector>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/stage/state_watch.hpp"

namespace dualpipe::detail {

/// Owner of an autograd node. LibTorch has changed the pointer type between releases.
using NodePtr = decltype(torch::autograd::Edge::function);

/// The entrance of one micro-batch into a graph of its own.
struct GraphInputs {
  /// What user code gets: new tensor objects that share memory and version counter with those entered. The
  /// differentiable ones are results, not leaves, so that code may write to them in place exactly where it could within
  /// one process.
  Tensors tensors;
  /// Where the gradients of all of them leave the graph; null where none is differentiable.
  NodePtr entrance;
};

/// Enters `inputs` into a new graph.
///
/// @param inputs  detached or fresh; requires_grad() says which are differentiable; an undefined one stays undefined.
/// While
///                gradients are disabled on the calling thread none is differentiable.
DUALPIPE_DECL GraphInputs enter_graph(const Tensors& inputs);

/// The backward of one micro-batch through one piece of autograd code: as a whole, or input gradients first and weight
/// gradients later. The split is found from the graph alone, for any code.
///
/// Both ways give bitwise the same gradients wherever a backward is a pure function of its gradients and its saved
/// tensors. An operation that has a parameter among its arguments runs its backward twice in the split, each time for
/// half of its results; one that keeps state or draws random numbers must not be split. Hooks on tensors and on
/// parameters fire once, a hook that was put behind an operation (Node::add_post_hook) may fire in both parts.
///
/// Backward runs on the calling thread. An exception from it ends the graph: its memory is freed, and it cannot be used
/// again.
class BackwardGraph {
 public:
  BackwardGraph() = default;
  /// @param inputs   what enter_graph gave.
  /// @param outputs  what the code returned; only their places in the graph are kept, the tensors may be dropped.
  DUALPIPE_DECL BackwardGraph(const GraphInputs& inputs, const Tensors& outputs);
  BackwardGraph(BackwardGraph&&) noexcept = default;
  BackwardGraph& operator=(BackwardGraph&&) noexcept = default;

  /// What a backward would accumulate into, before one has run: each tensor that requires grad and is no result.
  DUALPIPE_DECL Tensors leaves() const;

  /// B: all gradients in one run of the engine; parameters' gradients are accumulated. Frees the graph.
  ///
  /// @param output_gradients  one per output; undefined where nothing flows in; ignored where the output has no
  /// gradient.
  /// @return one per input; undefined where the input is not differentiable or nothing flowed to it. No parameter's
  /// gradient
  ///         shares their memory, now or later, so they may be given away.
  /// @throws InvalidArgument  another number of gradients than outputs.
  /// @throws Error            a backward of this graph has run before.
  DUALPIPE_DECL Tensors backward(const Tensors& output_gradients);

  /// I: the input gradients, as above; no parameter is touched. Frees what only they needed.
  ///
  /// @param owner  may be null.
  /// @throws InvalidArgument  a function of the user's changes the gradients or buffers of the owner itself, which would
  ///                          happen again in W.
  DUALPIPE_DECL Tensors backward_input(const Tensors& output_gradients, const BackwardOwner* owner = nullptr);

  /// W: accumulates the parameters' gradients that backward_input left. Frees the rest of the graph.
  /// @throws Error  backward_input has not run, or this has.
  DUALPIPE_DECL void backward_weight();
  /// The same piece by piece, for a host that has other things to do in between: the next of the parts that share no
  /// operation, as the weight gradients of two linear layers, last layer first. Where no input is differentiable, the
  /// first part is what leads to the first layer's parameters, and operations between run their backward twice, as in
  /// the split.
  ///
  /// @return whether there are more.
  /// @throws Error  backward_input has not run, or no part is left.
  DUALPIPE_DECL bool backward_weight_part(const BackwardOwner* owner = nullptr);

 private:
  /// What is left: the whole backward; all of it, as weight part; the weight part; some parts of it; nothing.
  enum class State { Ready, AllIsWeights, Weights, WeightParts, Done };
  struct Roots {
    torch::autograd::edge_list edges;
    torch::autograd::variable_list gradients;
  };

  DUALPIPE_DECL Roots start(const char* what, const Tensors& output_gradients);
  DUALPIPE_DECL void require_weights() const;
  static DUALPIPE_DECL Roots run_input_part(Roots roots, torch::autograd::Node* entrance, const BackwardOwner* owner);
  static DUALPIPE_DECL std::vector<Roots> independent(Roots roots);

  NodePtr entrance_;
  std::size_t num_inputs_ = 0;
  torch::autograd::edge_list outputs_;  // invalid where the output has no gradient
  std::vector<Roots> deferred_;         // where the weight part begins, or its parts, the last one to run first
  State state_ = State::Ready;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/stage/split_backward.ipp"
#endif
