#pragma once

#include <vector>

#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// When the results of a pair leave it under Publish::early, as a fraction of the pair's duration, above 0 and up to 1.
/// Negative: when its weight part begins. Stages with collectives have other fractions.
struct PairReady {
  double activation = -1;
  double gradient = -1;
  bool operator==(const PairReady&) const = default;
};

/// Durations of one stage.
struct StageCosts {
  double forward = 1;
  double backward = 2;  ///< I costs backward - weight
  double weight = 1;
  bool operator==(const StageCosts&) const = default;
};

/// The duration of a pair: a forward of one stage with a B of another (or the same).
struct PairCost {
  int forward = 0;   ///< its stage
  int backward = 0;  ///< its stage
  double duration = 3;
  bool operator==(const PairCost&) const = default;
};

/// The duration of some transfers, activations and gradients alike: over one boundary between stages, between two ranks
/// (a slow link), or both.
struct SendCost {
  static constexpr int any = -1;
  int boundary = any;              ///< b: between the stages b and b + 1
  int rank_a = any, rank_b = any;  ///< in either direction; both or none
  double duration = 0;
  bool operator==(const SendCost&) const = default;
};

/// How long everything takes, in one unit of the caller's choice. The first five members describe a model of equal
/// stages, as in `Costs{1, 2, 1, 3, 0.1}`; the others say where it is uneven. Durations are finite and not negative. A
/// weight part costs at most as much as its backward, and as its pair.
struct Costs {
  double forward = 1;
  double backward = 2;  ///< I costs backward - weight
  double weight = 1;
  double pair = 3;  ///< a forward with a B; with an I it costs pair - weight
  double send = 0;  ///< from publication to arrival on another rank; nothing on the same rank
  PairReady ready = {};

  /// Empty, or one for each stage instead of forward, backward and weight. A pair then costs as much as its two ops
  /// together, times pair / (forward + backward): overlapping saves the same share everywhere.
  std::vector<StageCosts> stages = {};
  std::vector<PairCost> pairs = {};   ///< pairs with a duration of their own
  std::vector<SendCost> sends = {};   ///< transfers with a duration of their own; the last entry that fits counts
  std::vector<double> slowdown = {};  ///< factors on the compute time of ranks 0, 1, …; 1 for ranks not listed

  double seconds_per_unit = 0;  ///< 0: the unit is abstract; 1: seconds, as measured
  bool operator==(const Costs&) const = default;
};

/// @throws InvalidArgument  naming the member and its value: a cost that is negative, not finite or out of proportion;
/// `stages` that are not the schedule's; an entry for a stage, boundary or rank that is not there.
DUALPIPE_DECL void check(const Costs& costs, int num_ranks, int num_stages);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/costs.ipp"
#endif
