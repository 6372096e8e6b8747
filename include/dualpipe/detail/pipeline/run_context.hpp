#pragma once

#include <c10/util/intrusive_ptr.h>

#include <map>
#include <string>
#include <vector>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"
#include "dualpipe/detail/pipeline/flight_recorder.hpp"
#include "dualpipe/detail/pipeline/mailbox.hpp"
#include "dualpipe/detail/pipeline/micro_batch.hpp"
#include "dualpipe/detail/pipeline/recorder.hpp"

namespace dualpipe::detail {

/// What one run of one rank works with.
struct RunContext {
  Communicator& communicator;
  const std::map<int, Stage>& stages;
  PairOrders& orders;
  const Plan& plan;
  const RunInputs& inputs;
  Recorder& recorder;
  FlightRecorder& flight;
  /// Weight parts run where the host would wait for a collective, and launches find a place between them: some stage of
  /// this rank communicates, and waiting holds up the host. Else they have their places in the order, as on a device,
  /// whose streams wait while the host runs ahead.
  bool fills_waits = false;

  Mailbox mailbox = {};
  MicroBatches micro_batches = {};
  RunOutputs outputs = {};
  /// Tensors that the first step would train, though no stage has registered them.
  std::vector<c10::weak_intrusive_ptr<at::TensorImpl>> unregistered = {};
  int cell = 0;  ///< number of the step under way, or to come, on this rank

  int rank() const { return communicator.rank(); }
  /// "rank 3: ", the text, and the cells of the schedule around the step.
  std::string explained(const std::string& text) const { return explained(text, cell); }
  std::string explained(const std::string& text, int at) const {
    return str("rank ", communicator.world_rank(rank()), ": ", text, "\n  ",
               cells_around(plan.schedule, rank(), at, 2, world_ranks(communicator)));
  }
  const std::vector<Instruction>& program() const { return plan.program.ranks[rank()]; }
  const Transfer& transfer(int index) const { return plan.program.order[index]; }
  const Stage& stage_of(const Op& op) const { return stages.at(op.stage); }
  int num_stages() const { return plan.schedule.num_stages; }
  bool last(const Op& op) const { return op.stage == num_stages() - 1; }
  bool publishes_early() const { return plan.publish == Publish::early; }
};

}  // namespace dualpipe::detail
