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

}  // namespace dualpipe::detail
