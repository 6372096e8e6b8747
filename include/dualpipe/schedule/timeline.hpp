#pragma once

#include <string>
#include <vector>

#include "dualpipe/schedule/op.hpp"

namespace dualpipe {

enum class Lane {
  compute,  ///< a whole step, waits for its collectives included
  send,
  receive,
  collective,  ///< a communication inside a stage
  node,        ///< a node that computes, within the step of a stage that communicates
  reduction,   ///< the sum of a stage's gradients over the ranks that hold it
};

/// Something a rank did or will do. In the lanes `send` and `receive`, `step.op` is the op that produced what travels:
/// F for an activation, I for an input gradient; in `collective` and `node` it is the side of the step: F, I, B or W;
/// in `reduction` it is the W of the stage, of micro-batch 0, which stands for all.
struct Interval {
  int rank = 0;
  Lane lane = Lane::compute;
  Step step;
  double begin = 0;  ///< in the timeline's unit
  double end = 0;
  std::string node = {};  ///< lanes collective, node and reduction: its name, where known
  bool operator==(const Interval&) const = default;
};

/// What a rank that holds a stage keeps of it. Zeros: not known, or nothing.
struct StageSize {
  double parameters = 0;  ///< numbers in them
  double bytes = 0;       ///< of parameters and buffers
  bool operator==(const StageSize&) const = default;
};

/// What all ranks do over time. The simulator and the tracer both produce one, so every picture and report exists once.
struct Timeline {
  std::string name;
  int num_ranks = 0;
  double seconds_per_unit = 0;  ///< 0: the unit is abstract (simulated costs); 1: seconds (traced)
  std::vector<Interval> intervals;
  std::vector<StageSize> stages = {};  ///< of the model that was trained, by stage; empty: not known
};

}  // namespace dualpipe
