#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <fstream>
#include <string>

namespace dualpipe::detail {

/// Identifies the running kernel. Processes with equal ids share one steady clock.
inline std::string boot_id() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  return id;
}

/// Nanoseconds of std::chrono::steady_clock, which all processes of one host share.
inline std::int64_t now_ns() noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// Ranks with equal ones are threads of one process.
inline std::string process_identity() { return boot_id() + '-' + std::to_string(::getpid()); }

}  // namespace dualpipe::detail
