#pragma once

#include <string>
#include <vector>

namespace dualpipe::detail {

/// Which device a rank is to use, and what it finds on its host.
struct RankDevice {
  int rank = 0;
  int local_rank = 0;
  int local_size = 1;
  int wanted = -1;  ///< -1: the local rank
  int count = 0;    ///< devices that the process sees
  std::string identity = {};

  int index() const { return wanted >= 0 ? wanted : local_rank; }
};

/// Why the rank can have no device; empty: it can.
///
/// @param why  what CUDA says where it sees none.
std::string device_problem(const RankDevice& rank, const std::string& why);

/// Which ranks use the same device; empty: none do.
std::string sharing_problem(const std::vector<std::string>& identity_by_rank);

constexpr int kSharesDevices = 23000;  ///< the version of NCCL from which on ranks can use one device

/// What keeps ranks that are meant to from sharing a device; empty: nothing does, or each has its own.
///
/// @param version  of NCCL.
/// @param enabled  NCCL_MULTI_RANK_GPU_ENABLE in the environment; null where it is not set.
std::string sharing_obstacle(const std::vector<std::string>& identity_by_rank, int version, const char* enabled);

}  // namespace dualpipe::detail
