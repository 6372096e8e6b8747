#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/files.hpp"
#include "dualpipe/detail/pipeline/arrival_memory.hpp"
#include "dualpipe/detail/pipeline/call_statement.hpp"
#include "dualpipe/detail/pipeline/device_hash.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"
#include "dualpipe/detail/pipeline/finite.hpp"
#include "dualpipe/detail/pipeline/flight_recorder.hpp"
#include "dualpipe/detail/pipeline/health.hpp"
#include "dualpipe/detail/pipeline/observers.hpp"
#include "dualpipe/detail/pipeline/plans.hpp"
#include "dualpipe/detail/pipeline/replicas.hpp"
#include "dualpipe/detail/pipeline/vote.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/train/mesh.hpp"

namespace dualpipe::detail {

/// What a DualPipe consists of.
class PipelineState {
 public:
  /// Where a rank and its pipeline are among the replicas.
  struct Ranks {
    std::shared_ptr<Communicator> world;     ///< of all replicas
    std::shared_ptr<Communicator> pipeline;  ///< of this rank's replica; `world` where there is one
    MeshShape shape;
    int replica() const { return shape.replica_of(world->rank()); }
  };

  /// Collective, as the constructor of DualPipeImpl, but for the copies of the stages: see start().
  DUALPIPE_DECL PipelineState(Ranks ranks, DualPipeOptions options, const StageFactory& factory, IsExpert is_expert);
  /// Collective: connects, makes the copies of each stage equal, and freezes the stages.
  DUALPIPE_DECL void start();

  // The methods of DualPipeImpl. `module` is the DualPipeImpl, which holds the stages' modules.
  DUALPIPE_DECL StepResult step(const Batch& batch, const LossFn& loss, const torch::nn::Module& module);
  DUALPIPE_DECL StepResult evaluate(const Batch& batch, const LossFn& loss, const torch::nn::Module& module);
  DUALPIPE_DECL Tensors predict(const Batch& batch, bool everywhere, const torch::nn::Module& module);
  DUALPIPE_DECL Batch broadcast_batch(const Batch& batch);
  DUALPIPE_DECL at::Tensor clip_grad_norm(double max_norm, bool error_if_nonfinite);
  /// @throws Error  no call is possible, and CommError, as Health::require().
  void require() { health_.require(); }
  bool shards_optimizer() const noexcept { return options_.shard_optimizer; }
  /// Whether this rank updates the parameter.
  bool owns(const at::Tensor& parameter) const { return replicas_->owns(parameter); }
  /// Collective: throws on every rank what one of them has found, as the other calls do.
  void check_on_all(const std::string& finding) {
    require();
    health_.watched([&] { agree_that_fine(world(), finding); });
  }
  /// Collective: `update` changes parameters that this rank owns, and all ranks get the values and vote.
  ///
  /// @param finding           why this rank cannot; empty: it can.
  /// @throws InvalidArgument  on every rank, what one of them found; nothing was changed.
  DUALPIPE_DECL void update_parameters(const std::string& finding, const std::function<void()>& update);
  DUALPIPE_DECL void broadcast_parameters();
  void set_step(std::int64_t step) { step_ = step, calls_ = 0; }
  void write_record(const std::string& path) const { write_file(path, flight_.to_json()); }
  DUALPIPE_DECL void add_observer(std::shared_ptr<Observer> observer);

  const std::shared_ptr<Communicator>& communicator() const noexcept { return communicator_; }
  const Ranks& ranks() const noexcept { return ranks_; }
  int expert_part(const std::string& name) const {
    const int parts = ranks_.shape.expert;
    return parts > 1 && is_expert_(name) ? ranks_.replica() % parts : -1;
  }
  DUALPIPE_DECL std::vector<std::string> tied_names(const std::string& name) const;
  const Schedule& schedule() const noexcept { return training_->schedule; }
  const std::map<int, Stage>& stages() const noexcept { return executor_->stages(); }
  bool feeds_inputs() const { return runs_stage(0); }
  bool computes_loss() const { return runs_stage(schedule().num_stages - 1); }

 private:
  using Call = CallStatement::Call;

  Communicator& world() const { return *ranks_.world; }
  int rank() const { return communicator_->rank(); }
  MicroBatchCount count_of(const CallAgreement& agreed) const {
    return {static_cast<int>(agreed.num_micro_batches), ranks_.shape.data, ranks_.replica(), schedule().num_stages};
  }
  bool runs_stage(int stage) const { return stages().count(stage) != 0; }
  DUALPIPE_DECL std::vector<Communicator::Edge> edges() const;
  std::vector<int> numbers() const { return world_ranks(world()); }

  /// Collective: how every call begins. Prepares the batch and compares notes with the other ranks.
  ///
  /// @param loss  null: the call has none.
  /// @throws InvalidArgument  on every rank, what one of them found; nothing else was sent.
  DUALPIPE_DECL CallAgreement enter(Call call, const Batch& batch, const LossFn* loss, RunInputs& inputs);
  /// Collective: how a call without a batch begins. @throws InvalidArgument  as enter().
  void agree_on_call(const CallStatement& mine) const {
    agreement(exchange_statements(world(), mine), ranks_.shape, ranks_.replica(), -1, numbers());
  }
  /// Runs the body of a call, and tells the observers when it begins and ends.
  ///
  /// @param dropped  set by a body that commits nothing; may be null.
  template <class Body>
  auto observed(const Body& body, const bool* dropped = nullptr);
  /// The plan of a training step with so many micro-batches. @throws InvalidArgument  there is none, on all ranks.
  DUALPIPE_DECL std::shared_ptr<const Plan> plan_of(int num_micro_batches);
  /// Runs the plan of a call that does not train.
  DUALPIPE_DECL RunOutputs run_forward(const std::shared_ptr<const Plan>& plan, RunInputs& inputs,
                                       const torch::nn::Module& module);
  /// The gradients that this rank has found, those of inputs behind those of parameters_.
  DUALPIPE_DECL Tensors gradients_of(const RunOutputs& outputs) const;
  /// Which of gradients_of() are not finite; empty: all are. Waits for the device.
  DUALPIPE_DECL std::string finding_of_gradients(const FiniteCheck& check) const;
  /// Called by all ranks. Collective among those that feed inputs; empty on the others.
  DUALPIPE_DECL Tensors gathered_input_gradients(const Plan& plan, const Batch& batch, const RunInputs& inputs,
                                                 RunOutputs& outputs);
  DUALPIPE_DECL StepResult result(const StepVote& vote, RunOutputs outputs, const CallAgreement& agreed);
  /// Of a step that was committed ahead of its device.
  ///
  /// @param vote  as vote_ahead gives it.
  /// @param end   over when the device has finished the step.
  DUALPIPE_DECL StepResult result_ahead(StepVote vote, RunOutputs outputs, const CallAgreement& agreed, Pending end,
                                        std::int64_t step);

  Ranks ranks_;
  std::shared_ptr<Communicator> communicator_;  // the pipeline's
  DualPipeOptions options_;
  IsExpert is_expert_;
  FlightRecorder flight_;
  Health health_;
  Observers observers_;
  std::shared_ptr<const Plan> training_;
  std::unique_ptr<Plans> plans_;
  StageTraits traits_;
  int described_ = 0;    // micro-batches that the record names
  bool warned_ = false;  // of micro-batches that are left out of an order
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Replicas> replicas_;
  std::unique_ptr<ArrivalMemory> arrivals_;
  Tensors parameters_;
  std::vector<int> feeding_ranks_, loss_ranks_;
  std::optional<std::uint64_t> seed_;
  at::Generator generator_;  // what stages draw from, with a seed
  std::int64_t step_ = 0;
  std::int64_t steps_run_ = 0;  // here; step_ may begin elsewhere
  std::int64_t calls_ = 0;      // evaluations and predictions since the step before
  // Of the step before, if asynchronous.
  DeviceHashes last_hashes_;
  std::shared_ptr<UnfinishedStep> last_step_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/pipeline_state.ipp"
#endif
