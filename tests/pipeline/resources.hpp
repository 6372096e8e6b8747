#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace dualpipe::test {

/// What this process holds.
struct Resources {
  std::int64_t descriptors = 0;
  std::int64_t threads = 0;
  std::int64_t resident_bytes = 0;
  std::int64_t address_space_bytes = 0;

  static Resources now() {
    namespace fs = std::filesystem;
    Resources held;
    held.descriptors = std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator());
    held.threads = std::distance(fs::directory_iterator("/proc/self/task"), fs::directory_iterator());
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
      if (line.starts_with("VmRSS:")) held.resident_bytes = std::stoll(line.substr(6)) * 1024;
      if (line.starts_with("VmSize:")) held.address_space_bytes = std::stoll(line.substr(7)) * 1024;
    }
    return held;
  }
};

}  // namespace dualpipe::test
