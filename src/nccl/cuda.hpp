#pragma once

#include <memory>
#include <string>

#include "nccl/api.hpp"

// The real tables. Only nccl_cuda.cpp sees the headers of CUDA and NCCL.
namespace dualpipe::detail {

/// Number of CUDA devices that this process sees; `why` says what is the matter where there are none.
int cuda_device_count(std::string& why);
/// What tells the device from all others, of all hosts.
std::string cuda_device_identity(int index);

std::shared_ptr<DeviceApi> cuda_device(int index);
/// @throws DeviceFailure  a library older than the headers was loaded; the text names the file.
std::shared_ptr<NcclApi> nccl_library(int device_index);

/// Of the library that was loaded, as NCCL counts: 23007 is 2.30.7.
int nccl_version();
/// "2.30.7"
std::string nccl_version_text(int code);
/// Why a library of version `loaded` from `file` cannot serve a program that was built for version `expected`; empty:
/// it can.
std::string nccl_version_problem(int expected, int loaded, const std::string& file);

}  // namespace dualpipe::detail
