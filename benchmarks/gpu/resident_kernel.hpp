#pragma once

#include <atomic>
#include <cstdint>

/// A kernel that occupies multiprocessors until it is told to end: a stand-in for a receive whose sender has not come.
/// 640 threads and 48 KiB of shared memory a block, as much as keeps most kernels off its multiprocessor. Ends by itself
/// after some seconds.
class ResidentKernel {
 public:
  /// For the current device. @throws std::runtime_error  as all of it
  ResidentKernel();
  ~ResidentKernel();
  ResidentKernel(const ResidentKernel&) = delete;
  ResidentKernel& operator=(const ResidentKernel&) = delete;

  /// Returns when all blocks are resident.
  void start(int blocks);
  /// Returns when the kernel has ended.
  void stop();

 private:
  static constexpr int most_blocks = 256;

  void* library_ = nullptr;
  void* kernel_ = nullptr;
  void* stream_ = nullptr;
  std::uint32_t* words_ = nullptr;  // of page-locked memory: whether to end, then for each block whether it runs
};
