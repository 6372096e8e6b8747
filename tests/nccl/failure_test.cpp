#include <gmock/gmock.h>
#include <torch/torch.h>

#include <atomic>
#include <latch>

#include "async_rank.hpp"

// What becomes of the ranks when devices and NCCL fail, by tables that fail on demand.
namespace dualpipe::test {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using namespace std::chrono_literals;

// ---------------------------------------------------------------------------------------------------------------------
// abort

/// Ends one communicator after the other.
class OneByOne final : public ForwardingNccl {
 public:
  using ForwardingNccl::ForwardingNccl;
  void abort(std::span<const detail::NcclComm> comms) noexcept override {
    for (const detail::NcclComm& comm : comms) inner_->abort({&comm, 1});
  }
};

/// On rank 0 an all_to_all that its peer never comes to, and a send of what is computed from it: the send's
/// communicator cannot end before that of the all_to_all does.
std::vector<std::string> violations_of_an_abort(std::chrono::milliseconds patience, const Decorate& decorate) {
  const testing::NcclEmulation emulation(2, {.patience = patience});
  std::latch computed(2);
  run_emulated(
      emulation, 2, {.timeout = 20s},
      [&](const EmulatedRank& emulated) {
        const AsyncRank rank(emulated);
        rank->connect({{0, 1}, {1, 0}});
        Pending sent;
        if (rank.rank() == 0) {
          const Signature expected(2, {.dtype = at::kFloat, .sizes = {100}});
          const Tensors mixed = rank->all_to_all({rank.empty({100}), rank.empty({100})}, expected).take();
          at::Tensor made = rank.empty({100});
          rank.run(slow_fill(made, [mixed](std::int64_t) { return 1.0F; }, 0us));
          sent = rank->send(1, {std::move(made)});
        }
        computed.arrive_and_wait();
        if (rank.rank() == 1) rank->abort("enough");
        rank.synchronize();  // ends, as nothing waits for what never comes
        EXPECT_THROW(rank->barrier().wait(), CommError);
      },
      decorate);
  EXPECT_EQ(emulation.open_streams(), 0U);
  return emulation.violations();
}

TEST(Abort, EndsAStepWhoseTransfersWaitForACollective) { EXPECT_THAT(violations_of_an_abort(60s, nullptr), IsEmpty()); }

TEST(Abort, OfOneCommunicatorAfterTheOtherWouldHang) {
  const auto one_by_one = [](int, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
    nccl = std::make_shared<OneByOne>(nccl);
  };
  EXPECT_THAT(violations_of_an_abort(200ms, one_by_one), ::testing::Contains(HasSubstr("abort hangs")));
}

}  // namespace
}  // namespace dualpipe::test
