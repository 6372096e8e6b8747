#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/local.hpp"
#include "nccl/communicator.hpp"
#include "nccl/emulation/emulation.hpp"

namespace dualpipe::test {

/// What a test does on one rank of an emulated NCCL.
struct EmulatedRank {
  std::shared_ptr<Communicator> communicator;
  std::shared_ptr<detail::DeviceApi> device;
  const testing::NcclEmulation& emulation;
};

/// Puts something else in the place of a rank's tables.
using Decorate = std::function<void(int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>&)>;

/// Runs `body` on ranks that are threads, each with an NcclCommunicator over `emulation` and a local control plane.
inline void run_emulated(const testing::NcclEmulation& emulation, int num_ranks, const detail::NcclUse& use,
                         const std::function<void(EmulatedRank)>& body, const Decorate& decorate = nullptr) {
  run_ranks(num_ranks,
            [&](std::shared_ptr<Communicator> control) {
              std::shared_ptr<detail::DeviceApi> device = emulation.device(control->rank());
              std::shared_ptr<detail::NcclApi> nccl = emulation.nccl(control->rank());
              if (decorate) decorate(control->rank(), device, nccl);
              body({detail::NcclCommunicator::world(control, device, nccl, use), device, emulation});
            },
            {.timeout = use.timeout});
}

/// Expects that nothing was done that real NCCL leaves undefined, and that nothing is left over.
inline void expect_clean(const testing::NcclEmulation& emulation) {
  for (const std::string& violation : emulation.violations()) ADD_FAILURE() << violation;
  EXPECT_EQ(emulation.open_streams(), 0u);
}

inline std::vector<Edge> all_edges(int num_ranks) {
  std::vector<Edge> edges;
  for (int from = 0; from < num_ranks; ++from)
    for (int to = 0; to < num_ranks; ++to)
      if (from != to) edges.push_back({from, to});
  return edges;
}

}  // namespace dualpipe::test
