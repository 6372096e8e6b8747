#pragma once

#include <optional>
#include <vector>

#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe::planner {

/// A part of a timeline.
struct Window {
  double begin = 0;
  double end = 0;
  double length() const { return end - begin; }
  bool operator==(const Window&) const = default;
};

/// Time in which a rank communicates, by whether it computes meanwhile. What is under way at the same time counts once.
struct Overlap {
  double hidden = 0;
  double exposed = 0;
  double total() const { return hidden + exposed; }
};

/// Where a rank's time goes: compute + collectives.exposed + bubble is all of it.
struct Usage {
  double busy = 0;      ///< within its steps
  double compute = 0;   ///< the nodes that compute, in steps that communicate; else the whole step
  double bubble = 0;    ///< the rest: waiting for other ranks, and for transfers from them
  Overlap collectives;  ///< communication inside stages
  Overlap transfers;    ///< sends and receives between stages; exposed ones lie in the bubble, or beside a collective
  Overlap reductions;   ///< sums of gradients; exposed ones lie in the bubble, or behind the last computing
};

struct RankReport : Usage {
  int rank = 0;
  int peak_activations = 0;  ///< forwards held from the start of F to the end of B or I; in a pair both count
};

struct Report {
  double makespan = 0;  ///< length of the window that is reported
  std::vector<RankReport> ranks;
  Usage total() const;  ///< sums over ranks
};

/// From the first begin to the last end of computing, over all ranks.
Window extent(const Timeline& timeline);

/// The time in which all ranks are in their main part, which is a rank's longest run of pairs with no other step
/// between: in DualPipe its step 4. Nothing where a rank has no two pairs in a row, or no time is common to all.
std::optional<Window> main_part(const Timeline& timeline);

/// In the timeline's unit, of one training step: its extent, or a window of it, at whose ends what reaches beyond is
/// cut, but for sums of gradients that reach beyond the extent. Steps of a rank that begin at the same time count in the order of the list. Peak activations are those of the
/// whole.
///
/// @throws InvalidArgument  an interval of a rank that the timeline does not have.
Report report(const Timeline& timeline);
Report report(const Timeline& timeline, const Window& window);

/// One timeline for each training step: a new one begins where a rank repeats an op. Ranks synchronize between steps,
/// so the last end of computing of one separates it from the next.
///
/// @throws InvalidArgument  an interval of a rank that the timeline does not have.
std::vector<Timeline> split_steps(const Timeline& timeline);

/// The median of each number over several steps, the lower of two in the middle. So parts need not add up to their
/// sums. @throws InvalidArgument  no report, or different numbers of ranks.
Report median(const std::vector<Report>& reports);

}  // namespace dualpipe::planner
