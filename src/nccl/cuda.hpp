#pragma once

#include <memory>
#include <string>

#include "nccl/api.hpp"

// DeviceApi and NcclApi for real devices. Only cuda.cpp includes the headers of CUDA and NCCL.
namespace dualpipe::detail {

/// Number of CUDA devices that this process sees; if none, `why` explains.
int cuda_device_count(std::string& why);
/// The device's UUID, unique over all hosts.
std::string cuda_device_identity(int index);

std::shared_ptr<DeviceApi> cuda_device(int index);
/// @throws DeviceFailure  the loaded library is older than the headers; the text names the file.
std::shared_ptr<NcclApi> nccl_library(int device_index);

/// Version code of the loaded library: 23007 is 2.30.7.
int nccl_version();
/// "2.30.7"
std::string nccl_version_text(int code);
/// Why the library loaded from `file` is too old for this program; empty if it is not.
std::string nccl_version_problem(int expected, int loaded, const std::string& file);

}  // namespace dualpipe::detail
