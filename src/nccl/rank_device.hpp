#pragma once

#include <string>
#include <vector>

namespace dualpipe::detail {

/// The device that a rank is to use, and what its process sees.
struct RankDevice {
  int rank = 0;
  int local_rank = 0;
  int local_size = 1;
  int wanted = -1;            ///< device index; -1: the local rank
  int count = 0;              ///< visible devices
  std::string identity = {};  ///< UUID of the device

  int index() const { return wanted >= 0 ? wanted : local_rank; }
};

/// Why the rank cannot use its device; empty if it can.
///
/// @param why  CUDA's explanation if it sees no device.
std::string device_problem(const RankDevice& rank, const std::string& why);

/// Error text if two ranks use the same device, else empty.
std::string sharing_problem(const std::vector<std::string>& identity_by_rank);

/// The first version of NCCL that lets several ranks use one device.
inline constexpr int first_version_to_share_devices = 23000;

/// Why ranks cannot share a device as asked; empty if they can, or if none is shared.
///
/// @param version  NCCL's version code.
/// @param enabled  NCCL_MULTI_RANK_GPU_ENABLE of the environment; null if not set.
std::string sharing_obstacle(const std::vector<std::string>& identity_by_rank, int version, const char* enabled);

/// Why the ends of transfers cannot start together; empty if they can.
///
/// @param launch_order  NCCL_LAUNCH_ORDER_IMPLICIT of the environment; null if not set.
/// @param connections   CUDA_DEVICE_MAX_CONNECTIONS.
std::string both_ready_obstacle(const char* launch_order, const char* connections);

}  // namespace dualpipe::detail
