#pragma once

#include <cstddef>
#include <functional>

namespace dualpipe::fuzz {

/// What a piece of work took from operator new, all threads together.
struct Allocations {
  std::size_t count = 0;
  std::size_t peak_bytes = 0;  ///< at one time, beyond what was held before
};

/// Not to be nested. What `work` throws passes through.
Allocations allocations_of(const std::function<void()>& work);

}  // namespace dualpipe::fuzz
