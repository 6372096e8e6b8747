#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/stage/layer_random.hpp"
#include "dualpipe/detail/stage/shared_memory.hpp"
#include "dualpipe/detail/stage/split_backward.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe {

/// One micro-batch on one stage: its way forward through the nodes of the chain, what it leaves there, and its way
/// back. Advanced node by node; launching a collective does not wait, what needs its result does. Used by one thread.
///
///     StageRun run(stage, inputs, context);
///     while (!run.advanced()) run.advance();
///     run.finish_forward();                    // run.outputs()
///     run.start_backward(output_gradients);
///     while (!run.advanced()) run.advance();
///     Tensors input_gradients = run.finish_backward();
///     run.backward_weight();
class StageRun {
 public:
  /// @param stage   outlives the way forward.
  /// @param inputs  as received: detached, requires_grad() saying which are differentiable; may be undefined.
  /// @param loss    last stage only, null elsewhere. Its gradients flow through the same graph.
  /// @param shared  inputs that shared memory where they were made, and may not be written to.
  /// @throws InvalidArgument  another number of inputs than the stage takes.
  DUALPIPE_DECL StageRun(const Stage& stage, Tensors inputs, StageContext context, StageLoss loss = nullptr,
                         detail::SharedPairs shared = {});

  /// Runs the next node on the way: computes, or launches a collective. Settles first. With gradients enabled in
  /// training and disabled otherwise. What user code throws comes through as it is.
  ///
  /// @throws InvalidArgument  a write in place into one of two tensors that share memory, where the other node or stage
  ///                          that gave them returned both; a loss that is not one floating-point element, a collective that moves a tensor that is
  ///                          not there or returns another number, output gradients of another number than the outputs.
  DUALPIPE_DECL void advance();
  /// No node is left on this way. A collective may be under way.
  bool advanced() const { return backward_ ? next_ < 0 : next_ == num_nodes_; }
  /// The collective that is under way, empty where none is.
  const Pending& under_way() const { return pending_; }
  /// Waits for it (on a device, the current stream waits) and puts its results into their places.
  DUALPIPE_DECL void settle();

  /// Ends the way forward: settles and sets outputs().
  DUALPIPE_DECL void finish_forward();
  /// Detached, each with the requires_grad of what the stage returned (false outside of training). May be moved from.
  Tensors& outputs() { return values_; }
  /// Pairs of outputs that share memory, or shared it as inputs.
  const detail::SharedPairs& shared() const { return shared_; }
  /// Detached, without dimensions; undefined without loss function.
  const at::Tensor& loss() const { return loss_value_; }
  /// Sum of what StageContext::add_loss has added; detached, without dimensions; undefined where there was nothing.
  const at::Tensor& added_loss() const { return added_loss_; }

  /// Begins the way back: the input parts of the nodes, last to first, and the backward of the collectives.
  ///
  /// @param output_gradients  one per output, or the single gradient of the loss (without dimensions) where there was
  ///                          one; undefined where nothing flows in.
  /// @param whole_first       node 0 may compute its weight gradients at once, as nobody waits for the input gradients.
  /// @param added_gradient    of each loss that StageContext::add_loss has added; 0: none flows in.
  DUALPIPE_DECL void start_backward(Tensors output_gradients, bool whole_first = false, double added_gradient = 1);
  /// Ends it: settles and gives one gradient per input.
  DUALPIPE_DECL Tensors finish_backward();

  /// Weight parts of the nodes, each to be run once after the node's input part. A node without one (a collective, or
  /// a backward that is not split) does nothing.
  DUALPIPE_DECL bool has_weight_part(int node) const;
  DUALPIPE_DECL void backward_weight(int node);
  /// The next piece of it, see BackwardGraph::backward_weight_part. False: nothing is left.
  DUALPIPE_DECL bool backward_weight_part(int node);
  /// Of all nodes, last to first.
  DUALPIPE_DECL void backward_weight();

  // The whole way back at once, waiting for collectives.
  DUALPIPE_DECL Tensors backward(Tensors output_gradients);        ///< B
  DUALPIPE_DECL Tensors backward_input(Tensors output_gradients);  ///< I

  /// Tensors that the backward would accumulate gradients into. Between the way forward and the way back, in training.
  DUALPIPE_DECL Tensors leaves() const;

  int num_nodes() const { return num_nodes_; }
  /// The chain's node that runs or ran last on this way; before the first, -1 forward and num_nodes() backward.
  int node() const { return backward_ ? next_ + 1 : next_ - 1; }
  /// Name of the stage's node that ran last on the way forward, of which the chain may have merged several.
  const std::string& node_name() const { return node_name_; }
  /// Whether node `node` keeps anything for the backward of its collective.
  bool keeps_handle(int node) const { return nodes_[node].handle != nullptr; }

 private:
  /// What a node that is computed again begins with.
  struct Beginning {
    Tensors inputs = {};
    std::vector<std::uint32_t> versions = {};  // of the inputs
    detail::SharedPairs shared = {};
    detail::LayerRandom random;
    std::vector<at::Generator> generators = {};  // LibTorch's, where the pipeline has no seed
    std::vector<at::Tensor> states = {};         // of the generators
    Tensors leaves = {};                         // what its backward will accumulate into; of the first step only
  };
  /// What one node of the chain left.
  struct Node {
    detail::BackwardGraph graph = {};                         // computing nodes; empty outside of training
    std::shared_ptr<const Communication> communication = {};  // null: the node computes
    std::shared_ptr<void> handle = {};                        // of the collective
    at::Tensor added = {};                                    // sum of its added losses, an output of the graph
    bool whole = false;                                       // the weight part ran with the input part
    std::unique_ptr<Beginning> beginning = {};                // null: the graph is there
  };

  DUALPIPE_DECL void advance_forward(int index);
  DUALPIPE_DECL void advance_backward(int index);
  DUALPIPE_DECL void compute(std::size_t begin, std::size_t end);
  DUALPIPE_DECL std::unique_ptr<Beginning> beginning() const;
  /// Runs node `index` of the chain again, for its graph.
  DUALPIPE_DECL void recompute(int index);
  /// For that: a run of its own, in which nothing has been computed.
  DUALPIPE_DECL StageRun(const StageRun& of, const Beginning& beginning);
  /// What node `index` draws is that of its layer. @param begin  of the segment.
  DUALPIPE_DECL void enter_layer(std::size_t index, std::size_t begin);
  DUALPIPE_DECL void leave_layer(std::size_t index);
  /// As the key of what it draws names it.
  DUALPIPE_DECL std::string layer_of(std::size_t index) const;
  /// Tells node `index` of the chain that its inputs are there, if it is a collective.
  DUALPIPE_DECL void prepare(int index);
  DUALPIPE_DECL void launch(const std::shared_ptr<const Communication>& communication);

  const Stage* stage_;
  StageContext context_;
  detail::LayerRandom random_;
  StageLoss loss_;
  at::Tensor loss_value_, added_loss_;
  double added_gradient_ = 1;
  int num_nodes_;
  bool split_;
  detail::BackwardOwner owner_;
  bool backward_ = false;
  bool whole_first_ = false;
  int next_ = 0;
  Tensors values_;  // detached: activations, on the way back gradients; undefined where a collective has taken them
  detail::SharedPairs shared_;  // of the activations
  Pending pending_;
  const Communication* moving_ = nullptr;  // of pending_
  std::vector<Node> nodes_;
  std::string node_name_;
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/stage/stage_run.ipp"
#endif
