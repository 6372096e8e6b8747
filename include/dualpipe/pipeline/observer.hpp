#pragma once

#include <cstdint>
#include <vector>

#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe {

/// Sees what one rank does. Called on the rank's own thread. What begin() and record() throw ends the step on all
/// ranks, like an error of user code. What end() throws after a commit is thrown by the next call, on all ranks.
class Observer {
 public:
  virtual ~Observer() = default;
  /// Called when it is added: what this rank holds, by stage of the model; zeros where it does not hold the stage.
  virtual void stages(const std::vector<StageSize>& sizes) { static_cast<void>(sizes); }
  /// A training step, evaluation or prediction begins.
  virtual void begin(std::int64_t step) { static_cast<void>(step); }
  /// Something ended. Times in seconds of std::chrono::steady_clock. Compute intervals come in order, transfers when
  /// their end is known. On the CPU most come at once; those of a device come at the end of the step, and not at all
  /// after a failure. Nodes that were launched ahead lie within the step before theirs.
  virtual void record(const Interval& interval) { static_cast<void>(interval); }
  /// It ended; `committed` is false after a failure, also where begin() of another observer threw.
  virtual void end(bool committed) { static_cast<void>(committed); }
};

}  // namespace dualpipe
