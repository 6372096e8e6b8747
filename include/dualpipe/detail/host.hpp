#pragma once

#include <fstream>
#include <string>

namespace dualpipe::detail {

/// Identifies the running kernel. Processes with equal ids share one steady clock.
inline std::string boot_id() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  return id;
}

}  // namespace dualpipe::detail
