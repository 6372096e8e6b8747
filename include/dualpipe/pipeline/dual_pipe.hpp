#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/pipeline/batch.hpp"
#include "dualpipe/pipeline/observer.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/stage/as_stage.hpp"
#include "dualpipe/train/mesh.hpp"

namespace dualpipe {
class ShardedOptimizer;
namespace detail {
class PipelineState;
class UnfinishedStep;
}  // namespace detail

/// What a step or an evaluation found. Everything is detached: keeping it keeps no graph.
///
/// After an asynchronous step (DualPipeOptions::asynchronous) loss and losses hold once wait() has returned. Outputs
/// are ready in the order of the stream that was current, as all tensors of a device are.
struct StepResult {
  torch::Tensor loss;  ///< zero-dimensional float64 on the CPU, the same on every rank: mean (or sum) of the losses,
                       ///< weighted by Batch::weights
  torch::Tensor
      losses;  ///< [replicas * micro-batches] float64 on the CPU, the same on every rank: of each micro-batch,
               ///< unscaled; those of replica d begin at d * micro-batches
  bool skipped =
      false;  ///< with OnNonFinite::skip: something was not finite, so gradients and buffers are what they were
  std::vector<Tensors> outputs;  ///< with keep_outputs: by micro-batch of this rank's replica, empty where another rank
                                 ///< ran its last stage
  Tensors input_gradients;  ///< of a step, on ranks that feed inputs: the gradient of `loss` with respect to each input
                            ///< that was passed with requires_grad, with its sizes, on the pipeline's device;
                            ///< undefined for the others. All of this replica's batch, whichever rank computed it, in
                            ///< the order in which inputs were passed: of micro-batches made by hand or by chunk, first
                            ///< those of micro-batch 0. Empty if no input requires grad
  torch::Tensor metrics;    ///< float64 on the CPU, the same on every rank: what the loss function returns behind
                            ///< the loss, summed over the micro-batches of all replicas
  torch::Tensor added_losses;  ///< [stages] float64 on the CPU, the same on every rank: what stages have added by
                               ///< StageContext::add_loss, reduced as `loss` is, which does not contain it

  /// losses, once they hold.
  DUALPIPE_DECL std::vector<double> micro_batch_losses() const;
  /// Returns when the device has finished the step; at once after a synchronous one. Called by the communicator's
  /// thread. Copies of a result share it.
  ///
  /// @throws CommError  the device failed after the step was committed: gradients, and parameters updated by them, may
  ///                    hold anything.
  DUALPIPE_DECL void wait() const;

 private:
  friend class detail::PipelineState;
  std::shared_ptr<detail::UnfinishedStep> unfinished_;
};

/// A model cut into stages and trained by a pipeline schedule: one object per rank. Its stages' modules are registered
/// as `stage<k>`, so an optimizer made from `parameters()` trains what this rank holds, and `train()`, `eval()` and
/// `to()` reach them.
///
/// Right: an optimizer that updates each parameter by its own gradient, as SGD and AdamW do.  Wrong: one that looks at
/// all gradients together. L-BFGS sees those of this rank only, and calls a closure that calls step() another number of
/// times on each rank.
///
/// Every method marked collective is called by all ranks in the same order, from the communicator's thread. step(),
/// evaluate() and predict() begin with a small message from each rank to all others. What one of them finds wrong is
/// InvalidArgument on every rank: nothing was computed, gradients, parameters and buffers are what they were, and the
/// next call works. It also works after predictions that could not be merged. Any other exception ends the pipeline:
/// make a new communicator and module.
class DualPipeImpl : public torch::nn::Module {
 public:
  using StageFactory = dualpipe::StageFactory;
  using LossFn = dualpipe::LossFn;

  /// Collective. Makes, proves and lowers the schedule, calls `factory` once for each stage that this rank holds (with a
  /// seed, see DualPipeOptions::seed, as StageFactory::make; ranks that are threads one after the other), moves the stages to the communicator's device and makes the copies of each stage equal.
  ///
  /// @throws InvalidArgument  options that are wrong or differ between ranks, a factory that threw, or a parameter that
  ///                          stages of different ranks share, where that can be seen (docs/stages.md): the same text
  ///                          on every rank. The communicator stays usable.
  DUALPIPE_DECL DualPipeImpl(std::shared_ptr<Communicator> communicator, DualPipeOptions options,
                             const StageFactory& factory);
  /// Collective over the mesh: as many pipelines as it has replicas, which train one model. Each replica passes a batch
  /// of its own, of the same number of micro-batches. Everything that is collective is so over the whole mesh; in a step
  /// gradients are summed over all replicas too, and the step commits on all ranks or on none.
  ///
  /// @param is_expert  parameters and buffers whose copies are on the ranks of Mesh::expert_replicas() only, and on those
  ///                   at the other places that hold the stage. Their gradients are summed over these ranks, so the
  ///                   stage's collectives bring together what the batches of an expert group give. Not empty where the
  ///                   mesh has expert groups of several ranks.
  /// @throws InvalidArgument  also what differs between replicas.
  DUALPIPE_DECL DualPipeImpl(const Mesh& mesh, DualPipeOptions options, const StageFactory& factory,
                             IsExpert is_expert = nullptr);
  DUALPIPE_DECL ~DualPipeImpl() override;

  /// Collective. One training step as a transaction: forward and backward of all micro-batches, gradients summed over
  /// the ranks that hold each stage, in all replicas, commit. Afterwards `.grad` has grown by this step's gradient, in the same tensor
  /// objects, equal on all holders. After an exception gradients and buffers are what they were. So are parameters,
  /// unless a forward has written to them.
  ///
  /// With DualPipeOptions::shard_optimizer that holds for owned_parameters(). `.grad` of all others is undefined
  /// afterwards, whatever it was before.
  ///
  /// With DualPipeOptions::asynchronous the host does not wait for its device, and step() commits when all hosts have
  /// reached the end of the step. A device that fails later is reported by StepResult::wait() or, before it does
  /// anything, by the next step(), evaluate() or predict(), on all ranks. Gradients and parameters updated meanwhile
  /// may then hold anything, so go back to a checkpoint. A batch in page-locked memory must not be written to before
  /// wait(). With observers the host does wait, as they are told when the device did what. A loss or a gradient that is
  /// not finite is an Error of StepResult::wait() and of the next step() then, as the gradients were handed out before.
  ///
  /// @param batch  of this rank's replica; whole, or what this rank needs: inputs where feeds_inputs(), targets where computes_loss(), extras
  ///               where its stages use them. An input that requires grad has its gradient in
  ///               StepResult::input_gradients; it is a leaf, as gradients end there. No other tensor requires grad.
  ///               Micro-batches made by hand may be of any number, the same in each replica; a kind that has no order
  ///               for so few, or for an odd number, leaves some out of the order for more, which rank 0 says once.
  /// @param loss   from the last stage's outputs and a micro-batch's targets to one element, which requires grad. The
  ///               gradient that enters it is 1/N (mean), where N counts the micro-batches of all replicas, or 1
  ///               (sum); with Batch::weights the micro-batch's part of their sum, or its weight.
  /// @throws InvalidArgument  a batch that does not split, lacks something, or differs between ranks; copies of a stage
  ///                          that differ between its holders (compared every DualPipeOptions::compare_replicas_every
  ///                          steps); what an observer threw at the end of the step before; a loss or a gradient that
  ///                          is not finite, with DualPipeOptions::on_non_finite = error. The text names the
  ///                          micro-batch, and the parameter with its stage and rank.
  /// @throws Error            user code threw here; values of the batch on a device differ between ranks, which is
  ///                          known at the end of the step, of an asynchronous one at the end of the next.
  /// @throws CommError        another rank failed.
  DUALPIPE_DECL StepResult step(const Batch& batch, const LossFn& loss);
  /// Collective. Forward only, without gradients, with any number of micro-batches, the same in each replica
  /// (DualPipeOptions::num_micro_batches when the batch is whole). Leaves train() and eval() alone; errors as step().
  DUALPIPE_DECL StepResult evaluate(const Batch& batch, const LossFn& loss);
  /// Collective. The last stage's outputs for this replica's batch, where computes_loss(); else empty. Those of the
  /// micro-batches are merged as DualPipeOptions::merge_outputs says: by default concatenated along batch_dim. A list
  /// takes one place for each micro-batch: with two lists, first all of output 0, then all of output 1.
  ///
  /// @param batch       needed where feeds_inputs().
  /// @param everywhere  all ranks of the pipeline get them; the same on all ranks.
  /// @throws InvalidArgument  as evaluate(); outputs that do not merge so, such as, by default, one that does not have
  ///                          an entry along batch_dim for each sample of its micro-batch; another number of outputs
  ///                          than merge_outputs has entries.
  DUALPIPE_DECL Tensors predict(const Batch& batch, bool everywhere = false);

  /// Collective: what this rank needs of the batch that rank 0 of its pipeline passes, for a loader on one rank of each
  /// replica. Inputs where feeds_inputs(), targets where computes_loss(), and extras; on rank 0 `batch` itself. Tensors
  /// arrive on the CPU. What other ranks pass is not looked at.
  ///
  /// @throws InvalidArgument  an undefined tensor.
  DUALPIPE_DECL Batch broadcast_batch(const Batch& batch);

  /// Collective. Scales the gradients of the whole model to a 2-norm of at most `max_norm`, each parameter counted
  /// once. Gradients are dense or sparse. On a device the host waits for the norm, so that nothing is scaled after an
  /// abort.
  ///
  /// @param error_if_nonfinite  a norm that is infinite or NaN is an error; else it scales the gradients.
  /// @return  the norm before, zero-dimensional float64, the same on every rank.
  /// @throws InvalidArgument  on every rank, gradients are what they were: as clip_grad_norm() in train/clip.hpp.
  DUALPIPE_DECL torch::Tensor clip_grad_norm_(double max_norm, bool error_if_nonfinite = false);
  /// Collective. Parameters and buffers of the lowest holder of each stage replace the others'. Done by the
  /// constructor; call it after loading weights by hand.
  ///
  /// @throws InvalidArgument  on every rank, nothing has changed: ranks call different methods.
  DUALPIPE_DECL void broadcast_parameters();
  /// The number of steps that lie behind the model, 0 for a new one: StageContext::step, and random numbers with
  /// DualPipeOptions::seed, go on from there. load_checkpoint() calls it. The same on all ranks, which the next call
  /// compares.
  ///
  /// @throws InvalidArgument  a negative number.
  DUALPIPE_DECL void set_step(std::int64_t step);
  /// The observer sees what this rank does, from the next call on.
  DUALPIPE_DECL void add_observer(std::shared_ptr<Observer> observer);

  /// Writes what this rank has done last, and what it does now, for `dualpipe-plan report`: of a job that hangs, from
  /// another thread. A file of that name appears whole or not at all. Any thread.
  ///
  /// @throws InvalidArgument  with the path and the reason.
  DUALPIPE_DECL void write_record(const std::string& path) const;

  /// Of the ranks of this pipeline; with a mesh, of this rank's replica.
  DUALPIPE_DECL const std::shared_ptr<Communicator>& communicator() const;
  /// Of the ranks of all replicas; communicator() where there is one.
  DUALPIPE_DECL const std::shared_ptr<Communicator>& world() const;
  /// Which part of the experts this rank has of a parameter or buffer, by its name in the pipeline; -1 where all ranks
  /// that hold its stage have the same.
  DUALPIPE_DECL int expert_part(const std::string& name) const;
  /// All names that a parameter or buffer of this rank has in the pipeline: those of the stages that tie it (Stage::tie),
  /// of other ranks too, lowest stage first. Only `name` where no stage does.
  DUALPIPE_DECL std::vector<std::string> tied_names(const std::string& name) const;
  DUALPIPE_DECL const Schedule& schedule() const;
  DUALPIPE_DECL std::vector<int> local_stages() const;
  /// This rank runs the first stage for some micro-batches and needs their inputs.
  DUALPIPE_DECL bool feeds_inputs() const;
  /// This rank runs the last stage for some micro-batches and needs their targets.
  DUALPIPE_DECL bool computes_loss() const;

  /// As torch::nn::Module's, but a parameter that several stages of this rank share comes once, under its first name.
  DUALPIPE_DECL std::vector<torch::Tensor> parameters(bool recurse = true) const;
  DUALPIPE_DECL torch::OrderedDict<std::string, torch::Tensor> named_parameters(bool recurse = true) const;
  /// Those of parameters() that this rank updates, in their order. With DualPipeOptions::shard_optimizer each parameter of
  /// the model, frozen or not, has one owner among the ranks that hold it; the bytes are spread evenly over these as far as
  /// whole parameters allow, and a rank may own none. It stays the owner. Without, all of parameters().
  DUALPIPE_DECL std::vector<torch::Tensor> owned_parameters() const;

 private:
  friend class ShardedOptimizer;
  DUALPIPE_DECL explicit DualPipeImpl(std::unique_ptr<detail::PipelineState> state);

  std::unique_ptr<detail::PipelineState> state_;
};

/// Holds a DualPipeImpl, as modules of torch::nn are held.
class DualPipe : public torch::nn::ModuleHolder<DualPipeImpl> {
 public:
  using torch::nn::ModuleHolder<DualPipeImpl>::ModuleHolder;
  using Impl = DualPipeImpl;
  /// So that options may be written in place: `DualPipe pipe(comm, {.num_micro_batches = 8}, factory)`.
  DualPipe(std::shared_ptr<Communicator> communicator, DualPipeOptions options, const StageFactory& factory)
      : DualPipe(std::make_shared<DualPipeImpl>(std::move(communicator), std::move(options), factory)) {}
  DualPipe(const Mesh& mesh, DualPipeOptions options, const StageFactory& factory, IsExpert is_expert = nullptr)
      : DualPipe(std::make_shared<DualPipeImpl>(mesh, std::move(options), factory, std::move(is_expert))) {}
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/dual_pipe.ipp"
#endif
