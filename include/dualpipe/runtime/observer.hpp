#pragma once

#include <cstdint>

#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe {

/// Sees what one rank does. Called on the rank's own thread; what it throws ends the step like an error of user code.
class Observer {
 public:
  virtual ~Observer() = default;
  /// A training step, evaluation or prediction begins.
  virtual void begin(std::int64_t step) { static_cast<void>(step); }
  /// Something ended. Times in seconds of std::chrono::steady_clock; compute intervals come in order, transfers when
  /// their end is known.
  virtual void record(const Interval& interval) { static_cast<void>(interval); }
  /// The step ended; `committed` is false after a failure.
  virtual void end(bool committed) { static_cast<void>(committed); }
};

}  // namespace dualpipe
