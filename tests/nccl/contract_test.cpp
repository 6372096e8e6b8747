#include "comm/contract.hpp"

#include <latch>

#include "emulated_rank.hpp"

namespace dualpipe {
namespace {

contract::BackEnd nccl(std::string name, bool communicator_per_edge, bool start_when_both_ready = false) {
  const auto run = [communicator_per_edge, start_when_both_ready](int num_ranks, std::chrono::milliseconds timeout,
                                                                  const contract::Body& body) {
    const testing::NcclEmulation emulation(num_ranks);
    std::latch connected(num_ranks);  // a failure in a body must not end a connect() elsewhere
    test::run_emulated(emulation, num_ranks,
                       {.timeout = timeout,
                        .communicator_per_edge = communicator_per_edge,
                        .start_when_both_ready = start_when_both_ready},
                       [&](test::EmulatedRank rank) {
                         if (communicator_per_edge) rank.communicator->connect(test::all_edges(num_ranks));
                         connected.arrive_and_wait();
                         try {
                           body(rank.communicator);
                         } catch (const std::exception& error) {
                           rank.communicator->abort(error.what());
                           throw;
                         }
                       });
    test::expect_clean(emulation);
  };
  return {.name = std::move(name),
          .run = run,
          .any_order = communicator_per_edge,
          .buffered = false,
          .rank_order = false,
          .follows_waits = false};
}

}  // namespace

namespace contract {
INSTANTIATE_TEST_SUITE_P(Nccl, Contract,
                         ::testing::Values(nccl("Nccl", false), nccl("NcclPerEdge", true),
                                           nccl("NcclBothReady", true, true)),
                         name_of);
}

}  // namespace dualpipe
