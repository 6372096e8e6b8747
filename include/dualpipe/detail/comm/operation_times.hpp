#pragma once

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe::detail {

/// What a DeviceTrace may have as well: times of a device's communication, where somebody observes it. Without them, a
/// span() has no length.
class OperationTimes {
 public:
  virtual ~OperationTimes() = default;
  /// Whether what this rank launches from now on is timed; at first it is not.
  virtual void time_operations(bool on) = 0;
  /// Collective over `ranks`, when the device has finished what was timed: from now on the span() of an operation begins when
  /// the last of its participants among `ranks` had come to it.
  virtual void share_times(Communicator& ranks) = 0;

  /// Of this rank's communicators; null where there are none.
  static OperationTimes* of(Communicator& communicator) {
    return dynamic_cast<OperationTimes*>(communicator.device_trace());
  }
};

}  // namespace dualpipe::detail
