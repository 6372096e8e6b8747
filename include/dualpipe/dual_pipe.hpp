#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/runtime/observer.hpp"
#include "dualpipe/runtime/stage.hpp"
#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe {

/// The data of one step: whole tensors, split along DualPipeOptions::batch_dim into micro-batches, or micro-batches made by hand.
struct Batch {
  Tensors inputs;   ///< of the first stage
  Tensors targets;  ///< given to the loss function
  Tensors extras;   ///< side inputs that every stage sees (StageContext::extras); may be empty
  /// Pre-split, possibly uneven; micro-batch i is element i.
  static Batch from_micro_batches(std::vector<Batch> micro_batches);
  std::vector<Batch> micro_batches;  ///< set by from_micro_batches; then the tensors above are empty
};

struct StepResult {
  /// Zero-dimensional, detached, the same on every rank: the mean (or sum) of the micro-batch losses.
  torch::Tensor loss;
  /// Unscaled loss of each micro-batch, in order, the same on every rank.
  std::vector<double> micro_batch_losses() const;
  /// With keep_outputs: outputs[i] of the i-th micro-batch whose last stage this rank ran, detached.
  std::vector<Tensors> outputs;
  void wait() {}
  torch::Tensor losses;
};

/// A model cut into stages and trained by a pipeline schedule. One object per rank; every method is collective unless it says otherwise.
class DualPipeImpl : public torch::nn::Module {
 public:
  using StageFactory = dualpipe::StageFactory;
  using LossFn = std::function<torch::Tensor(const Tensors& outputs, const Tensors& targets)>;

  DualPipeImpl(std::shared_ptr<Communicator> communicator, DualPipeOptions options, const StageFactory& factory);
  ~DualPipeImpl() override;

  StepResult step(const Batch& batch, const LossFn& loss);
  StepResult evaluate(const Batch& batch, const LossFn& loss);
  Tensors predict(const Batch& batch);
  torch::Tensor clip_grad_norm_(double max_norm);
  void broadcast_parameters();
  void add_observer(std::shared_ptr<Observer> observer);

  const Schedule& schedule() const;
  std::vector<int> local_stages() const;
  bool feeds_inputs() const;
  bool computes_loss() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};
TORCH_MODULE(DualPipe);

}  // namespace dualpipe
