#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "planner/spans.hpp"

namespace dualpipe::detail {

/// What the pictures of a timeline have in common. The timeline must outlive it.
struct Picture {
  struct Row {
    int rank = 0;
    Activity activity;                   ///< steps: those that take time and are in view
    std::vector<const Interval*> nodes;  ///< by begin, as those below
    std::vector<const Interval*> collectives;
    std::vector<const Interval*> transfers;
    std::vector<const Interval*> reductions;
  };

  double origin = 0;          ///< first begin of computing, zero of the time axis
  double begin = 0, end = 0;  ///< what is shown
  double unit = 1;            ///< the shortest step, but never so short that the whole has more than `max_units`
  std::int64_t num_ranks = 0;
  std::int64_t num_micro_batches = 0;  ///< highest named plus one
  std::int64_t num_stages = 0;         ///< highest named plus one
  bool second_halves = false;          ///< some rank holds more than one stage, so shades differ
  std::vector<int> first_stages;       ///< of each rank: that of its first micro-batch, the lower one of two
  bool lanes = false;                  ///< some row has nodes or collectives
  bool transfers = false;              ///< some row has them
  bool reductions = false;             ///< some row has them
  bool one_pair = false;               ///< the nodes are those of one forward and one backward
  std::vector<Row> rows;

  static constexpr double max_units = 20000;

  /// Throws InvalidArgument if the timeline is not sound: a rank it does not have, times that are not numbers or run
  /// backwards; or if the options name a rank or a window that it does not have.
  explicit Picture(const Timeline& timeline, const planner::PictureOptions& options = {});

  double length() const { return end - begin; }
  /// The part of an interval that is shown.
  planner::Window shown(const Interval& interval) const;

  /// The rank's second stage: the way from the other end (DualPipe) or a later chunk (V, interleaved).
  bool second_half(int rank, const Op& op) const { return op.stage != first_stages[rank]; }

  /// What the shades mean; empty if there is only one.
  std::string shades() const;
};

/// The smallest of 1, 2, 5 times a power of ten that is at least `least`.
double round_step(double least);

/// Up to six digits, no trailing zeros.
std::string number(double value);

/// "attention-F" of a node or a collective, as the published order of a pair names it; I and B are both "-B".
std::string node_label(const Interval& interval);

/// Which op a collective or a node belongs to, for its colour: the backward of a collective is a part of the input
/// gradient, whether the step is a B or an I.
Op colored_op(const Interval& interval);

}  // namespace dualpipe::detail
