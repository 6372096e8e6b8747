#include "fuzz/allocations.hpp"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace {

// The replaced operators have nowhere else to count.
std::atomic<std::size_t> count{0};
std::atomic<std::size_t> held{0};
std::atomic<std::size_t> peak{0};

void* counted_malloc(std::size_t size) noexcept {
  void* const memory = std::malloc(std::max<std::size_t>(size, 1));
  if (memory == nullptr) return nullptr;
  ++count;
  const std::size_t now = held += ::malloc_usable_size(memory);
  if (now > peak) peak = now;
  return memory;
}

}  // namespace

void* operator new(std::size_t size) {
  void* const memory = counted_malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return counted_malloc(size); }

void operator delete(void* memory) noexcept {
  held -= ::malloc_usable_size(memory);
  std::free(memory);
}

void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }

namespace dualpipe::fuzz {

Allocations allocations_of(const std::function<void()>& work) {
  const std::size_t count_before = count, held_before = held;
  peak = held_before;
  work();
  return {count - count_before, peak - held_before};
}

}  // namespace dualpipe::fuzz
