#include <gmock/gmock.h>
#include <torch/torch.h>

#include <atomic>
#include <condition_variable>
#include <latch>
#include <mutex>

#include "async_rank.hpp"
#include "dualpipe/comm/device_trace.hpp"

// What becomes of the ranks when devices and NCCL fail, by tables that fail on demand.
namespace dualpipe::test {
namespace {

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

// ---------------------------------------------------------------------------------------------------------------------
// errors of the device on the rank's thread

class FaultyDevice final : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;
  void record(detail::DeviceEvent event, detail::DeviceStream stream) override {
    check();
    inner_->record(event, stream);
  }
  void wait(detail::DeviceStream stream, detail::DeviceEvent event) override {
    check();
    inner_->wait(stream, event);
  }
  bool done(detail::DeviceEvent event) override {
    check();
    return inner_->done(event);
  }
  double time_of(detail::DeviceEvent event) override {
    check();
    return inner_->time_of(event);
  }
  std::atomic<bool> broken{false};

 private:
  void check() const {
    if (broken) throw detail::DeviceFailure("CUDA: an illegal memory access was encountered");
  }
};

/// What the rank does, with an operation and a moment from before the device broke.
struct Use {
  std::string name;
  std::function<void(Communicator&, Pending&, const Moment&)> call;
};

class DeviceErrors : public ::testing::TestWithParam<Use> {};

TEST_P(DeviceErrors, AreCommErrorsAndEndAllRanks) {
  const testing::NcclEmulation emulation(2);
  std::shared_ptr<FaultyDevice> faulty;
  std::latch received(2);
  std::latch failed(2);
  run_emulated(
      emulation, 2, {.timeout = 20s},
      [&](const EmulatedRank& rank) {
        Communicator& comm = *rank.communicator;
        if (comm.rank() == 0) {
          Pending sent = comm.send(1, {torch::ones({5})});
          const auto moment = comm.device_trace()->mark();
          received.arrive_and_wait();
          faulty->broken = true;
          try {
            GetParam().call(comm, sent, *moment);
            ADD_FAILURE() << "nothing was thrown";
          } catch (const CommError& error) {
            EXPECT_EQ(error.origin_rank(), 0);
            EXPECT_THAT(error.what(), HasSubstr("CUDA: an illegal memory access was encountered"));
          }
          failed.arrive_and_wait();
        } else {
          EXPECT_TRUE(torch::equal(comm.receive(0).take().at(0), torch::ones({5})));
          received.arrive_and_wait();
          failed.arrive_and_wait();
        }
        EXPECT_THROW(comm.barrier().wait(), CommError);
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
        if (rank == 0) device = faulty = std::make_shared<FaultyDevice>(device);
      });
  expect_clean(emulation);
}

INSTANTIATE_TEST_SUITE_P(
    Calls, DeviceErrors,
    ::testing::Values(
        Use{"send", [](Communicator& comm, Pending&, const Moment&) { comm.send(1, {torch::ones({2})}); }},
        Use{"all_reduce", [](Communicator& comm, Pending&, const Moment&) { comm.all_reduce({torch::ones({2})}); }},
        Use{"broadcast", [](Communicator& comm, Pending&, const Moment&) { comm.broadcast({torch::ones({2})}, 0); }},
        Use{"fence", [](Communicator& comm, Pending&, const Moment&) { comm.fence(); }},
        Use{"mark", [](Communicator& comm, Pending&, const Moment&) { comm.device_trace()->mark(); }},
        Use{"reached", [](Communicator&, Pending&, const Moment& moment) { (void)moment.reached(); }},
        Use{"seconds", [](Communicator&, Pending&, const Moment& moment) { (void)moment.seconds(); }},
        Use{"wait", [](Communicator&, Pending& sent, const Moment&) { sent.wait(); }},
        Use{"synchronize", [](Communicator&, Pending& sent, const Moment&) { sent.synchronize(); }},
        Use{"done", [](Communicator&, Pending& sent, const Moment&) { (void)sent.done(); }},
        Use{"span", [](Communicator&, Pending& sent, const Moment&) { (void)sent.span(); }}),
    [](const auto& tested) { return tested.param.name; });

// ---------------------------------------------------------------------------------------------------------------------
// calls that do not return

/// Once armed, the next group does not end until its communicator is aborted, as where NCCL connects to a rank that has
/// stopped.
class HangingNccl final : public ForwardingNccl {
 public:
  using ForwardingNccl::ForwardingNccl;
  void group_end() override {
    inner_->group_end();
    std::unique_lock lock(mutex_);
    if (!armed_) return;
    changed_.wait(lock, [this] { return aborted_; });
    throw detail::DeviceFailure("NCCL: the communicator was aborted");
  }
  void abort(std::span<const detail::NcclComm> comms) noexcept override {
    {
      const std::lock_guard lock(mutex_);
      aborted_ = true;
    }
    changed_.notify_all();
    inner_->abort(comms);
  }
  void arm() {
    const std::lock_guard lock(mutex_);
    armed_ = true;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool armed_ = false, aborted_ = false;
};

TEST(Deadline, EndsACallOfNcclThatDoesNotReturn) {
  const testing::NcclEmulation emulation(2);
  std::shared_ptr<HangingNccl> hanging;
  std::latch connected(2);
  std::latch failed(2);
  run_emulated(
      emulation, 2, {.timeout = 500ms},
      [&](const EmulatedRank& rank) {
        connected.arrive_and_wait();
        if (rank.communicator->rank() == 0) hanging->arm();
        try {
          Pending sum = rank.communicator->all_reduce({torch::ones({3})});
          if (rank.communicator->rank() == 1) failed.arrive_and_wait();  // has no deadline of its own
          sum.wait();
          ADD_FAILURE() << "nothing was thrown";
        } catch (const CommError& error) {
          EXPECT_EQ(error.origin_rank(), 0);
          EXPECT_THAT(error.what(),
                      HasSubstr("NCCL has not come back from a call for longer than the timeout of 500 ms"));
        }
        if (rank.communicator->rank() == 0) failed.arrive_and_wait();
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
        if (rank == 0) nccl = hanging = std::make_shared<HangingNccl>(nccl);
      });
  expect_clean(emulation);
}

}  // namespace
}  // namespace dualpipe::test
