#pragma once

#include <string>

#include "dualpipe/stage/stage.hpp"

namespace dualpipe {

/// One micro-batch on its way forward through a stage, advanced node by node. Launching a collective does not wait;
/// what needs its result does. Used by one thread; does not outlive the stage and the context's extras.
class ForwardPass {
 public:
  /// Arguments and errors as those of Stage::forward.
  ForwardPass(const Stage& stage, Tensors inputs, const StageContext& context, StageLoss loss = nullptr);

  /// Runs the next node of the chain: computes, or launches a collective. Settles first.
  void advance();
  bool advanced() const { return next_ == num_nodes_; }  ///< no node is left to run

  /// The collective that is under way, empty where none is.
  const Pending& under_way() const { return pending_; }
  /// Waits for it and puts its results into their places.
  void settle();

  /// After all nodes: settles and gives what the micro-batch leaves.
  StageActivation take();

  /// The chain's node that runs or ran last; -1 before the first.
  int node() const { return next_ - 1; }
  /// Name of the stage's node that runs or ran last, of which the chain may have merged several; for messages.
  const std::string& at() const { return at_; }

 private:
  void compute(std::size_t begin, std::size_t end);
  void communicate(const Stage::Node& node);

  const Stage* stage_;
  StageContext context_;
  StageLoss loss_;
  int num_nodes_;
  int next_ = 0;
  Tensors values_;  // detached; undefined where a collective has taken them
  Pending pending_;
  const Communication* moving_ = nullptr;
  StageActivation result_;
  std::string at_;
};

/// The same micro-batch on its way back: the input parts of its nodes, last to first, and the backward of its
/// collectives. Their weight parts are StageActivation's. Does not outlive the activation.
class BackwardPass {
 public:
  /// @param output_gradients  as StageActivation takes them.
  /// @param whole_first       node 0 may compute its weight gradients at once, as nobody waits for the input gradients.
  BackwardPass(StageActivation& activation, Tensors output_gradients, bool whole_first = false);

  void advance();
  bool advanced() const { return next_ < 0; }
  const Pending& under_way() const { return pending_; }
  void settle();

  /// After all nodes: settles and gives the gradients of the stage's inputs.
  Tensors take();

  StageActivation& activation() const { return *activation_; }
  /// The chain's node that runs or ran last; before the first, the number of nodes.
  int node() const { return next_ + 1; }

 private:
  StageActivation* activation_;
  bool whole_first_;
  int next_;
  Tensors gradients_;
  Pending pending_;
  const Communication* moving_ = nullptr;
};

}  // namespace dualpipe
