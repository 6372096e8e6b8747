#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"
#include "dualpipe/pipeline/batch.hpp"
#include "dualpipe/pipeline/observer.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe {

/// What a step or an evaluation found. Everything is detached: keeping it keeps no graph. After an asynchronous step
/// (DualPipeOptions::asynchronous), loss and losses hold once wait() has returned; outputs are ready in the order of
/// the stream that was current, as all tensors of a device are.
struct StepResult {
  torch::Tensor
      loss;  ///< zero-dimensional float64 on the CPU, the same on every rank: mean (or sum) of the micro-batch losses
  torch::Tensor
      losses;  ///< [micro-batches] float64 on the CPU, the same on every rank: each micro-batch's own loss, unscaled
  std::vector<Tensors>
      outputs;  ///< with keep_outputs: of each micro-batch, empty where another rank ran its last stage

  /// losses, once they hold.
  std::vector<double> micro_batch_losses() const;
  /// Returns when the device has come to the end of the step; at once where step() has waited for that. Called by the
  /// communicator's thread; copies of a result share it.
  ///
  /// @throws CommError  the device failed after the step was committed: gradients, and parameters updated by them, may
  ///                    hold anything.
  void wait() const;

 private:
  friend class DualPipeImpl;
  class Unfinished;
  std::shared_ptr<Unfinished> unfinished_;
};

/// A model cut into stages and trained by a pipeline schedule: one object per rank. Its stages' modules are registered
/// as `stage<k>`, so an optimizer made from `parameters()` trains what this rank holds, and `train()`, `eval()` and
/// `to()` reach them.
///
/// Every method marked collective is called by all ranks in the same order, from the communicator's thread.
class DualPipeImpl : public torch::nn::Module {
 public:
  using StageFactory = dualpipe::StageFactory;
  using LossFn = dualpipe::LossFn;

  /// Collective. Makes, proves and lowers the schedule, calls `factory` once for each stage that this rank holds, moves
  /// the stages to the communicator's device and makes the copies of each stage equal.
  ///
  /// @throws InvalidArgument  options that are wrong or differ between ranks: the same text on every rank, the
  /// communicator stays usable.
  /// @throws Error            the factory threw on some rank: on every rank, naming it.
  DualPipeImpl(std::shared_ptr<Communicator> communicator, DualPipeOptions options, const StageFactory& factory);
  ~DualPipeImpl() override;

  /// Collective. One training step as a transaction: forward and backward of all micro-batches, gradients summed over
  /// the holders of each stage, commit. Afterwards `.grad` has grown by this step's gradient, in the same tensor
  /// objects, equal on all holders; after an exception, on whichever rank, gradients and parameters are what they were
  /// before on every rank.
  ///
  /// With DualPipeOptions::asynchronous the host does not wait for its device, and step() commits when all hosts have
  /// come to the end of the step. What user code throws, what ranks disagree about and what fails until then still
  /// leaves everything as it was on every rank. What a device fails in afterwards is thrown by StepResult::wait() or,
  /// before it does anything, by the next step(), evaluate() or predict(), on all ranks; gradients and parameters
  /// updated meanwhile may then hold anything, so go back to a checkpoint. A batch in page-locked memory must not be
  /// written to before wait(). With observers, who are told when the device did what, the host does wait.
  ///
  /// @param batch  the whole batch on every rank; may be empty on ranks where neither feeds_inputs() nor
  /// computes_loss(), if it has no extras.
  /// @param loss   from the last stage's outputs and a micro-batch's targets to one element. The gradient that enters
  /// it is 1/N (mean) or 1 (sum).
  /// @throws InvalidArgument  a batch that does not split, or that differs between ranks (looked for in the first
  /// step).
  /// @throws Error            user code threw here; CommError: on another rank. The next step() throws at once: make a
  /// new communicator and module.
  StepResult step(const Batch& batch, const LossFn& loss);
  /// Collective. Forward only, without gradients, with any number of micro-batches (DualPipeOptions::num_micro_batches
  /// when the batch is whole). Does not touch train() or eval(); parameters and gradients stay as they are.
  StepResult evaluate(const Batch& batch, const LossFn& loss);
  /// Collective. The last stage's outputs, micro-batches merged along batch_dim, on the ranks where computes_loss();
  /// empty elsewhere.
  Tensors predict(const Batch& batch);

  /// Collective. Scales the gradients of the whole model to a 2-norm of at most `max_norm`, each parameter counted
  /// once. On a device the host waits for the norm, so that nothing is scaled by what an abort has left behind.
  /// @return  the norm before, zero-dimensional float64, the same on every rank.
  torch::Tensor clip_grad_norm_(double max_norm);
  /// Collective. Parameters and buffers of the lowest holder of each stage replace the others'. Done by the
  /// constructor; call it after loading weights by hand.
  void broadcast_parameters();
  /// Adds to those that see what this rank does, from the next step on.
  void add_observer(std::shared_ptr<Observer> observer);

  const Schedule& schedule() const;
  std::vector<int> local_stages() const;
  /// This rank runs the first stage for some micro-batches and needs their inputs.
  bool feeds_inputs() const;
  /// This rank runs the last stage for some micro-batches and needs their targets.
  bool computes_loss() const;

  /// As torch::nn::Module's, but a parameter that several stages of this rank share comes once, under its first name.
  std::vector<torch::Tensor> parameters(bool recurse = true) const;
  torch::OrderedDict<std::string, torch::Tensor> named_parameters(bool recurse = true) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

TORCH_MODULE(DualPipe);

}  // namespace dualpipe
