#pragma once

#include <memory>
#include <string>

namespace dualpipe {

/// A point in the work queued on a device.
class Moment {
 public:
  virtual ~Moment() = default;
  /// Whether the device has reached it. Does not wait.
  virtual bool reached() const = 0;
  /// When the device reached it, in seconds of std::chrono::steady_clock. Valid once reached().
  virtual double seconds() const = 0;
};

/// Tells when a device executes queued work, and names this work for profilers. Used by the communicator's thread only.
/// Errors of the device are CommErrors.
class DeviceTrace {
 public:
  virtual ~DeviceTrace() = default;
  /// The end of the work queued on the current stream. Does not wait.
  virtual std::shared_ptr<const Moment> mark() = 0;
  /// Opens a named range on this thread's line in a profiler (NVTX). Ranges nest.
  virtual void push_range(const std::string& name) = 0;
  virtual void pop_range() = 0;
};

}  // namespace dualpipe
