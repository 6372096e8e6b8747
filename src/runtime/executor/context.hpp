#pragma once

#include <map>
#include <memory>
#include <vector>

#include "dualpipe/runtime/executor.hpp"

namespace dualpipe {

/// What one run of one rank works with; all of it outlives the run.
struct RunContext {
  Communicator& communicator;
  const std::map<int, Stage>& stages;
  PairOrders& orders;
  const Plan& plan;
  const RunInputs& inputs;
  const std::vector<std::shared_ptr<Observer>>& observers;
  bool communicates = false;  ///< some stage of this rank does

  const Stage& stage_of(const Op& op) const { return stages.at(op.stage); }
  bool last(const Op& op) const { return op.stage == plan.schedule.num_stages - 1; }
  bool early() const { return plan.publish == Publish::early; }
  bool observed() const { return !observers.empty(); }
  void record(const Interval& interval) const {
    for (const auto& observer : observers) observer->record(interval);
  }
};

}  // namespace dualpipe
