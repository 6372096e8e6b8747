#include "resident_kernel.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "check.hpp"

namespace {

// Written by hand, so that building this needs no nvcc; the driver compiles it for the device that is there.
constexpr char program[] = R"(
.version 7.0
.target sm_70
.address_size 64
.visible .entry resident(.param .u64 words, .param .u64 limit_ns) {
  .shared .align 16 .b8 taken[49152];
  .reg .pred %p<4>;
  .reg .u32 %r<5>;
  .reg .u64 %rd<8>;
  ld.param.u64 %rd1, [words];
  ld.param.u64 %rd2, [limit_ns];
  cvta.to.global.u64 %rd1, %rd1;
  mov.u32 %r1, %tid.x;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra over;
  mov.u32 %r3, %ctaid.x;
  mul.wide.u32 %rd6, %r3, 4;
  add.u64 %rd7, %rd1, %rd6;
  mov.u32 %r4, 1;
  st.volatile.global.u32 [%rd7+4], %r4;
  mov.u64 %rd3, %globaltimer;
again:
  ld.volatile.global.u32 %r2, [%rd1];
  setp.ne.u32 %p2, %r2, 0;
  @%p2 bra over;
  mov.u64 %rd4, %globaltimer;
  sub.u64 %rd5, %rd4, %rd3;
  setp.lt.u64 %p3, %rd5, %rd2;
  @%p3 bra again;
over:
  bar.sync 0;
  ret;
}
)";

std::atomic_ref<std::uint32_t> word(std::uint32_t* words, int index) {
  return std::atomic_ref<std::uint32_t>(words[index]);
}

}  // namespace

ResidentKernel::ResidentKernel() {
  cudaLibrary_t library = nullptr;
  CHECK_CUDA(cudaLibraryLoadData(&library, program, nullptr, nullptr, 0, nullptr, nullptr, 0));
  library_ = library;
  cudaKernel_t kernel = nullptr;
  CHECK_CUDA(cudaLibraryGetKernel(&kernel, library, "resident"));
  kernel_ = kernel;
  cudaStream_t stream = nullptr;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  stream_ = stream;
  void* words = nullptr;
  CHECK_CUDA(cudaHostAlloc(&words, (1 + most_blocks) * sizeof(std::uint32_t), cudaHostAllocPortable));
  words_ = static_cast<std::uint32_t*>(words);
}

ResidentKernel::~ResidentKernel() {
  if (words_ != nullptr) word(words_, 0).store(1);
  if (stream_ != nullptr) {
    (void)cudaStreamSynchronize(static_cast<cudaStream_t>(stream_));
    (void)cudaStreamDestroy(static_cast<cudaStream_t>(stream_));
  }
  (void)cudaFreeHost(words_);
  if (library_ != nullptr) (void)cudaLibraryUnload(static_cast<cudaLibrary_t>(library_));
}

void ResidentKernel::start(int blocks) {
  if (blocks < 1 || blocks > most_blocks) throw std::runtime_error("a resident kernel has 1 to 256 blocks");
  std::fill_n(words_, 1 + most_blocks, 0U);
  void* words = words_;
  std::uint64_t limit = 10'000'000'000;
  void* arguments[] = {&words, &limit};
  CHECK_CUDA(cudaLaunchKernel(kernel_, dim3(static_cast<unsigned>(blocks)), dim3(640), arguments, 0,
                              static_cast<cudaStream_t>(stream_)));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  for (int block = 1; block <= blocks; ++block)
    while (word(words_, block).load() == 0) {
      if (std::chrono::steady_clock::now() > deadline)
        throw std::runtime_error("the device did not start all blocks of a kernel within 5 s");
      std::this_thread::yield();
    }
}

void ResidentKernel::stop() {
  word(words_, 0).store(1);
  CHECK_CUDA(cudaStreamSynchronize(static_cast<cudaStream_t>(stream_)));
}
