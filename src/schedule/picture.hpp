#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe::detail {

/// What the pictures of a timeline have in common.
struct Picture {
  double begin = 0, end = 0;  ///< first begin and last end of computing
  double unit = 1;            ///< the shortest step, but never so short that the whole has more than `max_units`
  std::int64_t num_micro_batches = 0;               ///< highest named plus one
  std::int64_t num_stages = 0;                      ///< highest named plus one
  bool second_halves = false;                       ///< some rank holds more than one stage, so shades differ
  std::vector<std::vector<const Interval*>> steps;  ///< per rank: its compute intervals that take time, by begin

  static constexpr double max_units = 20000;

  /// Throws InvalidArgument if the timeline is not sound: a rank it does not have, times that are not numbers or run
  /// backwards.
  explicit Picture(const Timeline& timeline);

  /// The rank's second stage: the way from the other end (DualPipe) or a later chunk (V, interleaved).
  static bool second_half(int rank, const Op& op) { return op.stage != rank; }

  /// Micro-batches enter at both ends of the ranks.
  bool bidirectional() const { return second_halves && num_stages == static_cast<std::int64_t>(steps.size()); }

  /// What the shades mean; empty if there is only one.
  std::string shades() const;
};

/// The smallest of 1, 2, 5 times a power of ten that is at least `least`.
double round_step(double least);

/// Up to six digits, no trailing zeros.
std::string number(double value);

/// "forward", "backward", …
const char* pass_name(Pass pass);

}  // namespace dualpipe::detail
