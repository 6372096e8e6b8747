#pragma once

#include <torch/optim/optimizer.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/train/master_weights.hpp"

namespace dualpipe {

/// The same on all ranks.
struct ShardedOptimizerOptions {
  /// Owners keep MasterWeights of the parameters that they own.
  bool master_weights = false;
};

/// Trains a pipeline that has DualPipeOptions::shard_optimizer: runs an optimizer on the parameters that each rank owns,
/// and gives the results to all ranks that hold them.
///
///     ShardedOptimizer optimizer(pipe, std::make_unique<torch::optim::AdamW>(pipe->owned_parameters(), options));
///     ...
///     optimizer.zero_grad();
///     pipe->step(batch, loss);
///     pipe->clip_grad_norm_(1.0);
///     optimizer.step();
///
/// Each parameter is whole on its owner, so optimizers that look at one parameter at a time are right, whether they work
/// element by element or on matrices. Without the option each rank owns all its parameters, step() sends nothing, and the
/// same program is right.
/// Several of them may train disjoint parts of the parameters.
class ShardedOptimizer {
 public:
  /// Collective.
  ///
  /// @param optimizer  of owned_parameters(), or some of them. On all ranks the same kind, with the same options.
  /// @throws InvalidArgument  on every rank: none, L-BFGS, which looks at all parameters together, or parameters that this
  ///                          rank does not own. The pipeline stays usable.
  DUALPIPE_DECL ShardedOptimizer(const DualPipe& pipe, std::unique_ptr<torch::optim::Optimizer> optimizer,
                                 const ShardedOptimizerOptions& options = {});
  DUALPIPE_DECL ~ShardedOptimizer();
  ShardedOptimizer(const ShardedOptimizer&) = delete;
  ShardedOptimizer& operator=(const ShardedOptimizer&) = delete;

  /// Collective. Updates the parameters that this rank owns, gives them to the ranks that hold them too, and counts the
  /// step when all ranks have all of them.
  ///
  /// Any exception but InvalidArgument ends the pipeline, and nothing is taken back: parameters may be some of this step
  /// and some of the one before, and so may optimizer states. Then steps() is the same on all ranks that are left, the text
  /// says it, and a new pipeline goes on from a checkpoint.
  ///
  /// @throws InvalidArgument  on every rank: parameters were added to the optimizer that this rank does not own, or ranks
  ///                          that hold a stage have frozen others of its parameters. Nothing was changed.
  /// @throws Error            the optimizer threw here.
  /// @throws CommError        another rank failed; the text is its own.
  DUALPIPE_DECL void step();
  /// Of the parameters that this rank owns.
  void zero_grad(bool set_to_none = true) { optimizer_->zero_grad(set_to_none); }

  /// How often step() has returned; the same on all ranks, but for one that was cut off while they voted, whose text says
  /// so.
  std::int64_t steps() const noexcept { return steps_; }
  /// The optimizer, as for set_learning_rate() and checkpoints. Its step() is called by step() alone.
  torch::optim::Optimizer& optimizer() noexcept { return *optimizer_; }
  const torch::optim::Optimizer& optimizer() const noexcept { return *optimizer_; }

 private:
  DUALPIPE_DECL void check_parameters() const;
  DUALPIPE_DECL void update();

  std::shared_ptr<DualPipeImpl> pipe_;
  std::unique_ptr<torch::optim::Optimizer> optimizer_;
  std::optional<MasterWeights> masters_;
  std::int64_t steps_ = 0;
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/train/sharded_optimizer.ipp"
#endif
