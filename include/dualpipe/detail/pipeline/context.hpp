#pragma once

#include <map>
#include <memory>
#include <vector>

#include "dualpipe/detail/pipeline/executor.hpp"
#include "dualpipe/detail/pipeline/recorder.hpp"

namespace dualpipe {

/// What one run of one rank works with; all of it outlives the run.
struct RunContext {
  Communicator& communicator;
  const std::map<int, Stage>& stages;
  PairOrders& orders;
  const Plan& plan;
  const RunInputs& inputs;
  Recorder& recorder;
  /// Weight parts run where the host would wait for a collective, and launches find a place between them: some stage of
  /// this rank communicates, and waiting holds up the host. Else they have their places in the order, as on a device,
  /// whose streams wait while the host runs ahead.
  bool fills_waits = false;

  const Stage& stage_of(const Op& op) const { return stages.at(op.stage); }
  bool last(const Op& op) const { return op.stage == plan.schedule.num_stages - 1; }
  bool early() const { return plan.publish == Publish::early; }
};

}  // namespace dualpipe
