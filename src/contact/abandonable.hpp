#pragma once

#include <algorithm>
#include <chrono>
#include <exception>
#include <future>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "contact/blocked_signals.hpp"
#include "dualpipe/detail/comm/stopwatch.hpp"

// Calls that may block for ever.
namespace dualpipe::detail {

/// Runs `action` on a thread of its own, for which nobody has to wait.
///
/// @param action  owns all that it uses.
template <class Action>
auto on_own_thread(Action action) -> std::future<decltype(action())> {
  std::packaged_task<decltype(action())()> task(std::move(action));
  auto result = task.get_future();
  try {
    const BlockedSignals blocked;
    std::thread(std::move(task)).detach();
  } catch (const std::system_error& error) {
    throw std::runtime_error(std::string("cannot start a thread: ") + error.what());
  }
  return result;
}

/// The result of `action`, which is left to itself when `limit` has elapsed on `watch`. Exceptions are passed on.
///
/// @param action  owns all that it uses.
/// @return        nullopt at the limit.
template <class Action>
auto result_within(Stopwatch& watch, Stopwatch::Clock::duration limit, Action action)
    -> std::optional<decltype(action())> {
  auto result = on_own_thread(std::move(action));
  for (;;) {
    const auto left = std::max(limit - watch.elapsed(), Stopwatch::Clock::duration::zero());
    if (result.wait_for(std::min(left, Stopwatch::slice)) == std::future_status::ready) return result.get();
    if (left == Stopwatch::Clock::duration::zero()) return std::nullopt;
  }
}

/// Looks something up again and again, one try at a time, for a caller that has other things to do.
template <class Result>
class Lookup {
 public:
  /// Begins a try unless one is under way. One that has failed is repeated after a pause.
  ///
  /// @param action  owns all that it uses.
  /// @return        nullopt: there is no result so far.
  /// @throws        what the last try has thrown.
  template <class Action>
  std::optional<Result> look(Action action) {
    if (failure_ && Clock::now() < again_at_) std::rethrow_exception(failure_);
    if (!result_.valid()) result_ = on_own_thread(std::move(action));
    if (result_.wait_for(patience) != std::future_status::ready) return std::nullopt;
    try {
      failure_ = nullptr;
      return result_.get();
    } catch (...) {
      failure_ = std::current_exception();
      again_at_ = Clock::now() + pause;
      throw;
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  /// Most have their result by then.
  static constexpr auto patience = std::chrono::milliseconds(20);
  static constexpr auto pause = std::chrono::milliseconds(500);

  std::future<Result> result_;
  std::exception_ptr failure_;
  Clock::time_point again_at_;
};

}  // namespace dualpipe::detail
