#pragma once

#include <vector>

#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe::planner {

/// When the kernel of a transfer starts on a device. A rank's transfers run one after the other, in the global order.
enum class TransferStart {
  posted,      ///< each end where the one before it has ended and its rank has posted it; the first then waits for the
               ///< other, and occupies its device
  both_ready,  ///< both ends at once, when both could start
};

/// How long kernels of transfers are on a rank's device, in the unit of the costs.
struct RankResidency {
  double resident = 0;  ///< some kernel is there
  double moving = 0;    ///< of this, data move
};

struct Residency {
  double makespan = 0;
  std::vector<RankResidency> ranks;
  /// Of the makespan, among the ranks.
  double most_resident() const { return largest_share(&RankResidency::resident); }
  double most_moving() const { return largest_share(&RankResidency::moving); }

 private:
  double largest_share(double RankResidency::* time) const;
};

/// Replays the programs of all ranks as devices run them: a step begins when what it waits for has arrived, and a kernel
/// that waits takes nothing from it.
///
/// @param program  lowered from `schedule`.
/// @throws InvalidArgument  costs that do not fit the schedule; a program that cannot run to its end.
Residency residency(const Schedule& schedule, const Program& program, const Costs& costs, TransferStart start,
                    Publish publish = Publish::early);

}  // namespace dualpipe::planner
