#include "nccl/rank_device.hpp"

#include <map>
#include <string_view>

#include "dualpipe/error.hpp"
#include "nccl/cuda.hpp"

namespace dualpipe::detail {

std::string nccl_version_text(int code) { return str(code / 10000, ".", code / 100 % 100, ".", code % 100); }

std::string nccl_version_problem(int expected, int loaded, const std::string& file) {
  if (loaded >= expected) return "";
  return str("LibTorch's NCCL ", nccl_version_text(expected), " expected, ", nccl_version_text(loaded),
             " loaded first from ", file,
             "; remove its folder from LD_LIBRARY_PATH and LD_PRELOAD, or put that of LibTorch's NCCL before it");
}

std::string device_problem(const RankDevice& rank, const std::string& why) {
  if (rank.count == 0)
    return str("rank ", rank.rank, ": no CUDA device (", why,
               "); without one use connect_sockets, with tensors of the CPU");
  if (rank.index() < rank.count) return "";
  if (rank.wanted >= 0)
    return str("rank ", rank.rank, ": NcclOptions::device is ", rank.wanted, ", but this process sees ", rank.count,
               rank.count == 1 ? " CUDA device" : " CUDA devices", ", counted from 0");
  return str("rank ", rank.rank, ": ", rank.local_size, " ranks on this host, but ", rank.count,
             rank.count == 1 ? " CUDA device" : " CUDA devices", " for them: start at most ", rank.count,
             " per host, or let NcclOptions::device and share_devices put several ranks on one");
}

std::string sharing_problem(const std::vector<std::string>& identity_by_rank) {
  std::map<std::string, std::size_t> first;
  for (std::size_t rank = 0; rank < identity_by_rank.size(); ++rank) {
    const auto [found, is_new] = first.try_emplace(identity_by_rank[rank], rank);
    if (is_new) continue;
    return str(
        "ranks ", found->second, " and ", rank, " use the same CUDA device (", found->first,
        "): set LOCAL_RANK or NcclOptions::device so that each has its own. To share it on purpose, which needs "
        "NCCL 2.30 or later, set NcclOptions::share_devices and NCCL_MULTI_RANK_GPU_ENABLE=1 in the environment");
  }
  return "";
}

std::string sharing_obstacle(const std::vector<std::string>& identity_by_rank, int version, const char* enabled) {
  if (sharing_problem(identity_by_rank).empty()) return "";
  if (version < first_version_to_share_devices)
    return str("ranks share a CUDA device, which needs NCCL 2.30 or later, and this is ", nccl_version_text(version),
               ": use a LibTorch that brings a newer one, or give each rank a device of its own");
  if (enabled == nullptr || std::string_view(enabled) != "1")
    return str(
        "ranks share a CUDA device, for which NCCL wants NCCL_MULTI_RANK_GPU_ENABLE=1 in the environment of "
        "all of them, and it is ",
        enabled == nullptr ? std::string("not set") : str("\"", enabled, "\""));
  return "";
}

std::string both_ready_obstacle(const char* launch_order, const char* connections) {
  if (launch_order != nullptr && std::string_view(launch_order) == "1")
    return "NcclOptions::start_when_both_ready and NCCL_LAUNCH_ORDER_IMPLICIT=1 exclude each other: NCCL would hold up "
           "every operation until the transfers launched before it have started, for some of which it has to run first";
  if (connections == nullptr || std::string_view(connections) != "32")
    return str(
        "NcclOptions::start_when_both_ready needs CUDA_DEVICE_MAX_CONNECTIONS=32 in the environment: a transfer that "
        "waits holds up every stream that shares its hardware queue, the computing one too, and it is ",
        connections == nullptr ? std::string("not set") : str("\"", connections, "\""));
  return "";
}

}  // namespace dualpipe::detail
