#pragma once

#include <unistd.h>

#include <fstream>
#include <string>

namespace dualpipe::detail {

/// Identifies the running kernel. Processes with equal ids share one steady clock.
inline std::string boot_id() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  return id;
}

/// Ranks with equal ones are threads of one process.
inline std::string process_identity() { return boot_id() + '-' + std::to_string(::getpid()); }

}  // namespace dualpipe::detail
