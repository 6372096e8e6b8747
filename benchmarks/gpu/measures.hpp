#pragma once

#include <nlohmann/json.hpp>
#include <stdexcept>

namespace dualpipe::bench {

/// Why something cannot be measured here.
class Skipped : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Of the libraries and of the device; needs none.
nlohmann::json versions();

// Each needs a device, and throws Skipped with the reason where it cannot run.

/// Microseconds of host per op, and calls of CUDA's runtime, synchronous and asynchronous.
nlohmann::json host_time();
/// How much of the transfers lies under compute: by the kernels' times, and by the library's report.
nlohmann::json hidden_share();
/// What a receive that waits costs a matrix product and a step.
nlohmann::json waiting_receive();

}  // namespace dualpipe::bench
