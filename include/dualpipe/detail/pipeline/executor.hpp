#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/comm/shared_values.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/arrivals.hpp"
#include "dualpipe/detail/pipeline/flight_recorder.hpp"
#include "dualpipe/detail/pipeline/pair_orders.hpp"
#include "dualpipe/detail/pipeline/recorder.hpp"
#include "dualpipe/pipeline/batch.hpp"
#include "dualpipe/pipeline/observer.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe {

namespace detail {

class Replicas;

/// A schedule with the program it was lowered to, proven to finish. Ranks that are threads of one process share one.
struct Plan {
  std::string key;  ///< what it was made of: equal plans have equal keys
  Schedule schedule;
  std::uint64_t checksum = 0;  ///< of the schedule
  Program program;             ///< of a rank that is a process: its own instructions only
  Publish publish = Publish::early;
  std::vector<int> placement;             ///< rank of (stage, micro_batch), at stage * num_micro_batches + micro_batch
  std::vector<Communicator::Edge> edges;  ///< that transfers use

  int rank_of(int stage, int micro_batch) const {
    return placement[static_cast<std::size_t>(stage) * schedule.num_micro_batches + micro_batch];
  }
};
/// Lowers and dry-runs.
///
/// @param ready         as in `lower`; the same on all ranks, as it decides the order of transfers.
/// @param num_replicas, held_as  as in `lower`.
/// @throws InvalidArgument  as `lower` and `dry_run` do.
DUALPIPE_DECL Plan make_plan(Schedule schedule, Publish publish, const PairReady& ready = {}, int num_replicas = 0,
                             const Schedule* held_as = nullptr);
/// Made by one of the ranks that are threads of this process, for all of them; elsewhere without what other ranks do.
///
/// @param make  gives the plan; `key` says all that it depends on.
template <class Make>
std::shared_ptr<const Plan> plan_of_rank(Communicator& communicator, const std::string& key, const Make& make) {
  const auto made = [&] {
    Plan plan = make();
    plan.key = key;
    return plan;
  };
  if (SharedValues* const values = communicator.control().shared_values()) return values->get<Plan>(key, made);
  auto plan = std::make_shared<Plan>(made());
  for (int rank = 0; rank < std::ssize(plan->program.ranks); ++rank)
    if (rank != communicator.rank()) std::vector<Instruction>().swap(plan->program.ranks[rank]);
  return plan;
}
/// Where pairs have their results if stages have collectives: the gradient first, the activation behind the last
/// collective of the forward.
inline constexpr PairReady communicating_pair{.activation = 1, .gradient = 0.75};

/// What enters one run of a plan on one rank.
struct RunInputs {
  std::vector<Batch>
      micro_batches;      ///< by micro-batch; empty on ranks that feed no inputs, compute no loss and use no extras
  LossFn loss;            ///< null: outputs only
  double loss_scale = 1;  ///< gradient that enters each loss, times its weight
  std::vector<double> weights = {};  ///< by micro-batch; empty: all are 1
  bool communicates = false;         ///< some stage of some rank has a collective
  std::int64_t step = 0;
  bool first_step = true;                ///< of this pipeline, whatever its number
  std::optional<RandomKey> random = {};  ///< of micro-batch 0 of the replica; none: no seed
  at::Generator generator = {};          ///< StageContext::generator
  bool training = true;                  ///< false: no graphs are built
  bool keep_outputs = false;             ///< of the last stage
  Replicas* replicas = nullptr;          ///< begins the sums of gradients; null: the plan has none
  /// Called at the first receive, if at all: what transfers of this plan brought before under the same conditions; what
  /// is not known yet is filled in. Null: every transfer is taken as it comes.
  std::function<Arrivals&()> arrivals = nullptr;

  double scale_of(int micro_batch) const { return weights.empty() ? loss_scale : loss_scale * weights[micro_batch]; }
};

/// What leaves it, but for added losses on ranks that run the last stage.
struct RunOutputs {
  std::map<int, at::Tensor> losses;        ///< by micro-batch, unscaled, detached
  std::map<int, Tensors> outputs;          ///< by micro-batch, detached; with keep_outputs
  std::map<int, Tensors> input_gradients;  ///< by micro-batch: of those inputs of the first stage that require grad
  Tensors metrics;                         ///< each summed over the rank's micro-batches, float64
  std::map<int, at::Tensor> added_losses;  ///< by stage: summed over the rank's micro-batches, scaled, float64

  /// Has to tell the observers what was still under way, once somebody has waited for it.
  std::shared_ptr<Recorder> recorder;
};

/// Runs programs: the only place where schedule, communicator and stages meet.
///
/// A step is a pair, or one half of it. Results leave the rank when they are there (Publish::early): the activation
/// after the last node of the forward's chain, the input gradient after the first of the backward's.
///
/// Gradients accumulate into the parameters' `.grad`. Runs on the calling thread. After an exception transfers may be
/// under way: the caller aborts the communicator.
class Executor {
 public:
  /// @param stages  those this rank holds, by their number; copied, so that nodes added later have no effect.
  /// @param flight  outlives this.
  DUALPIPE_DECL Executor(std::shared_ptr<Communicator> communicator, std::map<int, Stage> stages,
                         FlightRecorder& flight);
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  /// @throws CommError  a peer failed. Errors of user code come as Error (InvalidArgument stays InvalidArgument) with
  ///                    the rank, the pass, stage, node and micro-batch, and the cells of the schedule around it; the
  ///                    original is nested.
  DUALPIPE_DECL RunOutputs run(const Plan& plan, const RunInputs& inputs,
                               const std::vector<std::shared_ptr<Observer>>& observers);

  const std::map<int, Stage>& stages() const noexcept { return stages_; }

 private:
  std::shared_ptr<Communicator> communicator_;
  std::map<int, Stage> stages_;
  FlightRecorder& flight_;
  PairOrders orders_;
  bool fills_waits_ = false;  ///< see RunContext
};

}  // namespace detail
}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/executor.ipp"
#endif
