#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

// What a process asks of CUDA and what its devices run, as CUPTI sees it. One of both at a time.

/// Counts calls of CUDA's runtime from all threads, by name, while it lives.
class CudaCalls {
 public:
  CudaCalls();
  ~CudaCalls();
  CudaCalls(const CudaCalls&) = delete;
  CudaCalls& operator=(const CudaCalls&) = delete;
  std::map<std::string, std::int64_t> counts() const;
};

struct Kernel {
  std::string name;
  std::uint32_t device = 0;
  std::uint32_t stream = 0;  ///< as stream_number() gives it
  int blocks = 0;
  double begin = 0;  ///< seconds of the devices' clock
  double end = 0;
};

/// From here on kernels are remembered.
void begin_kernel_times();
/// The kernels that have ended since; all devices must be idle.
std::vector<Kernel> end_kernel_times();

/// The number by which a Kernel names this cudaStream_t of the current device.
std::uint32_t stream_number(void* stream);
