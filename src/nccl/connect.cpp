#include <ATen/ATen.h>

#include <cstdlib>
#include <utility>

#include "dualpipe/comm/nccl.hpp"
#include "dualpipe/detail/comm/agree.hpp"
#include "nccl/communicator.hpp"
#include "nccl/cuda.hpp"
#include "nccl/rank_device.hpp"

namespace dualpipe {
namespace {

void check_ctas(const NcclOptions& options) {
  for (const int each :
       {options.max_transfer_ctas, options.max_collective_ctas, options.max_sum_ctas, options.min_ctas})
    DUALPIPE_CHECK(each >= 0, "NcclOptions: a number of thread blocks must be 0 (NCCL's choice) or 1 and more; got ",
                   each);
  for (const int most : {options.max_collective_ctas, options.max_sum_ctas})
    DUALPIPE_CHECK(most == 0 || options.min_ctas <= most, "NcclOptions: min_ctas ", options.min_ctas,
                   " is above the most thread blocks of a collective, ", most,
                   "; raise max_collective_ctas and max_sum_ctas, or set them to 0");
}

}  // namespace

std::shared_ptr<Communicator> connect_nccl(const World& world, const NcclOptions& options) {
  check_ctas(options);
  const std::shared_ptr<Communicator> control = connect_sockets(world, options.connect);

  const detail::PlainTensors plain;
  // All ranks throw the error of any rank.
  detail::RankDevice mine{.rank = world.rank, .local_rank = world.local_rank, .local_size = world.local_size};
  mine.wanted = options.device;
  std::shared_ptr<detail::NcclApi> nccl;
  std::string problem;
  try {
    std::string why;
    mine.count = detail::cuda_device_count(why);
    problem = detail::device_problem(mine, why);
    if (problem.empty()) {
      mine.identity = detail::cuda_device_identity(mine.index());
      nccl = detail::nccl_library(mine.index());
    }
    if (problem.empty() && options.start_when_both_ready) {
      problem = detail::both_ready_obstacle(std::getenv("NCCL_LAUNCH_ORDER_IMPLICIT"),
                                            std::getenv("CUDA_DEVICE_MAX_CONNECTIONS"));
      if (!problem.empty()) problem = detail::str("rank ", world.rank, ": ", problem);
    }
  } catch (const std::exception& error) {
    problem = detail::str("rank ", world.rank, ": ", error.what());
  }
  const std::vector<std::string> problems = detail::all_gather_text(*control, problem);
  const std::vector<std::string> identities = detail::all_gather_text(*control, mine.identity);
  for (const std::string& each : problems) DUALPIPE_CHECK(each.empty(), each);
  const std::string shared = options.share_devices ? detail::sharing_obstacle(identities, detail::nccl_version(),
                                                                              std::getenv("NCCL_MULTI_RANK_GPU_ENABLE"))
                                                   : detail::sharing_problem(identities);
  for (const std::string& each : detail::all_gather_text(*control, shared)) DUALPIPE_CHECK(each.empty(), each);

  return detail::NcclCommunicator::world(
      control, detail::cuda_device(mine.index()), std::move(nccl),
      {.timeout = options.connect.timeout,
       .communicator_per_edge = options.communicator_per_edge,
       .start_when_both_ready = options.start_when_both_ready,
       .name = options.connect.name,
       .transfer_ctas = {.max = options.max_transfer_ctas},
       .collective_ctas = {.min = options.min_ctas, .max = options.max_collective_ctas},
       .sum_ctas = {.min = options.min_ctas, .max = options.max_sum_ctas},
       .largest_warm_up_bytes = std::size_t{64} << 20});
}

}  // namespace dualpipe
