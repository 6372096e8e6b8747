#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace dualpipe::detail {

/// For limits on waits: the time since its construction, without that in which this process was stopped. A scheduler
/// that suspends a whole job and resumes it must not use up what its ranks wait for each other. A waiting thread is
/// stopped with its process, so it wakes every `slice`, and a slice that took far too long was a stop. On a machine that
/// is merely loaded the limit comes later, at worst.
class Stopwatch {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr Clock::duration slice = std::chrono::milliseconds(100);

  /// Call it at least every `slice` while waiting.
  Clock::duration elapsed() {
    const auto now = Clock::now();
    const auto step = now - last_;
    last_ = now;
    return elapsed_ += step > least_stop ? slice : step;
  }

  /// As changed.wait_for() with a predicate, but until `limit` has elapsed on this watch.
  template <class Over>
  bool wait(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Clock::duration limit,
            const Over& over) {
    while (!over()) {
      const auto left = limit - elapsed();
      if (left <= Clock::duration::zero()) return false;
      changed.wait_for(lock, std::min(left, slice), over);
    }
    return true;
  }

 private:
  static constexpr Clock::duration least_stop = std::chrono::seconds(1);

  Clock::time_point last_ = Clock::now();
  Clock::duration elapsed_{0};
};

}  // namespace dualpipe::detail
