#pragma once

#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/timeline.hpp"
#include "dualpipe/schedule/transfer.hpp"

namespace dualpipe {

struct TimedTransfer {
  Transfer transfer;
  double ready = 0;    ///< published by its producer
  double arrival = 0;  ///< ready + what the transfer costs
};

struct Simulation {
  Timeline timeline;
  /// Boundary transfers between different ranks, by ready time; at equal times in an order that respects what depends
  /// on what.
  std::vector<TimedTransfer> transfers;
};

/// Runs the schedule with an unlimited number of asynchronous transfers: a step starts when the one before it on its
/// rank has ended and its inputs have arrived; a pair waits for both. Takes training and forward-only schedules.
/// Transfers appear in the timeline (lane send of the sender, lane receive of the receiver, from ready to arrival)
/// where they take time. Linear in the number of ops but for the sort of the transfers.
///
/// @throws InvalidArgument  costs that `check` refuses or whose sum is no finite number, or a schedule that cannot run
/// to its end.
DUALPIPE_DECL Simulation simulate(const Schedule& schedule, const Costs& costs = {}, Publish publish = Publish::early);

/// The makespan alone, which takes a fraction of the time and memory.
DUALPIPE_DECL double simulate_makespan(const Schedule& schedule, const Costs& costs = {},
                                       Publish publish = Publish::early);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/simulate.ipp"
#endif
