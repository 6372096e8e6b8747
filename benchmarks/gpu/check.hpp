#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

/// Throws with CUDA's text.
inline void check_cuda(cudaError_t result, const char* call) {
  if (result != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(result) + " (" + call + ")");
}
#define CHECK_CUDA(call) check_cuda(call, #call)
