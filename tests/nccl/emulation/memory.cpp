#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <memory>
#include <new>

#include "nccl/emulation/cluster.hpp"
#include "nccl/emulation/nccl_emulation.hpp"

namespace dualpipe::testing {
namespace emulation {

Memory::~Memory() {
  for (const auto& [data, size] : sizes_) ::operator delete(data, std::align_val_t(64));
}

void* Memory::allocate(std::uint64_t stream, std::size_t bytes) {
  const std::size_t size = rounded(bytes);
  const std::lock_guard lock(mutex_);
  auto& reusable = free_[{stream, size}];
  if (!reusable.empty()) {
    void* data = reusable.back();
    reusable.pop_back();
    return data;
  }
  void* data = ::operator new(size, std::align_val_t(64));
  std::memset(data, 0xFF, size);
  sizes_[data] = size;
  return data;
}

void Memory::free(std::uint64_t stream, void* data) {
  const std::lock_guard lock(mutex_);
  free_[{stream, sizes_.at(data)}].push_back(data);
}

}  // namespace emulation

namespace {

/// Allocates all CPU tensors. CPU work is complete when a call returns, so freed memory is poisoned at once.
class PoisoningAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &ignore, at::kCPU};
    auto* block = new Block{memory_.allocate(0, bytes), bytes};
    return {block->data, block, &release, at::kCPU};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  static PoisoningAllocator& instance() {
    static auto* allocator = new PoisoningAllocator;  // outlives every tensor
    return *allocator;
  }

 private:
  struct Block {
    void* data;
    std::size_t bytes;
  };
  static void ignore(void*) {}
  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    std::memset(block->data, 0xFF, block->bytes);
    instance().memory_.free(0, block->data);
  }

  emulation::Memory memory_;
};

}  // namespace

void poison_freed_memory() { c10::SetCPUAllocator(&PoisoningAllocator::instance(), /*priority=*/100); }

}  // namespace dualpipe::testing
