#pragma once

#include <memory>
#include <string>

namespace dualpipe {

/// A point in the work that a device was given.
class Moment {
 public:
  virtual ~Moment() = default;
  /// Whether the device has come to it. Does not wait.
  virtual bool reached() const = 0;
  /// When it came there, in seconds of std::chrono::steady_clock; once reached().
  virtual double seconds() const = 0;
};

/// When a device does what the host asks of it, and how a profiler is told what that is. Used by the communicator's
/// thread only. Errors of the device are CommErrors.
class DeviceTrace {
 public:
  virtual ~DeviceTrace() = default;
  /// The end of what the current stream has been given. The host does not wait.
  virtual std::shared_ptr<const Moment> mark() = 0;
  /// A range of this thread in a profiler's view (NVTX). They nest.
  virtual void push_range(const std::string& name) = 0;
  virtual void pop_range() = 0;
};

}  // namespace dualpipe
