#pragma once

#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "socket/blocked_signals.hpp"

namespace dualpipe::detail {

/// The result of `action`, which may block for ever: it runs on a thread of its own, which is left to itself at the
/// deadline. Exceptions are passed on.
///
/// @param action  owns all that it uses.
/// @return        nullopt at the deadline.
template <class Action>
auto result_until(std::chrono::steady_clock::time_point deadline, Action action) -> std::optional<decltype(action())> {
  std::packaged_task<decltype(action())()> task(std::move(action));
  auto result = task.get_future();
  try {
    const BlockedSignals blocked;
    std::thread(std::move(task)).detach();
  } catch (const std::system_error& error) {
    throw std::runtime_error(std::string("cannot start a thread: ") + error.what());
  }
  if (result.wait_until(deadline) != std::future_status::ready) return std::nullopt;
  return result.get();
}

}  // namespace dualpipe::detail
