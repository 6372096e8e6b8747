#pragma once

#include <optional>
#include <vector>

#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe::planner {

/// What one stage keeps in memory, in one unit of the caller's choice.
struct StageMemory {
  double activation = 1;  ///< of one micro-batch, from the start of F to the end of B or I
  double weight = 0;      ///< what a weight part that waits needs, from the end of I to the end of W
  double state = 0;       ///< parameters, gradients, optimizer: always
  bool operator==(const StageMemory&) const = default;
};

/// The first three members describe a model of equal stages, as in `MemoryCosts{1, 0.2, 6}`. With the defaults, memory
/// counts activations. All values are finite and not negative.
struct MemoryCosts {
  double activation = 1;
  double weight = 0;
  double state = 0;
  std::vector<StageMemory> stages = {};  ///< empty, or one for each stage instead of the three above
  /// The share of `state` that is optimizer state and that a sharded optimizer spreads evenly over the ranks that hold a
  /// stage, in all replicas of the pipeline; 0: it does not.
  double sharded = 0;
  int replicas = 1;
  /// Stages are computed again before their backward (Stage::recompute): what stays of an activation from the end of F to
  /// the start of B or I, the inputs of a stage. At most the activation. Empty: all of it stays.
  std::optional<double> kept = {};
  bool operator==(const MemoryCosts&) const = default;
};

struct RankMemory {
  double state = 0;  ///< of all stages that the rank holds, without what other ranks have of their optimizer
  double peak = 0;   ///< state, activations and waiting weight parts where they are most together
  int peak_activations = 0;
  int peak_weights = 0;  ///< weight parts that wait at once
};

/// What each rank holds at most. Depends on the order of its steps only, not on what they cost; in a pair the
/// activations of both its halves count.
///
/// @throws InvalidArgument  a value that is negative or not finite, a share above 1, no replica, a list that does not have one entry per stage, an
/// op of a stage that the schedule does not have.
std::vector<RankMemory> memory(const Schedule& schedule, const MemoryCosts& costs = {});

/// @throws InvalidArgument  naming the value.
void check(const MemoryCosts& costs, int num_stages);

}  // namespace dualpipe::planner
