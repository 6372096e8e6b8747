// Steps that do not wait for their device: what they promise, and what they cannot.
#include <gmock/gmock.h>

#include <cmath>
#include <latch>
#include <mutex>

#include "lagging.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr int kRanks = 2;
constexpr int kMicroBatches = 4;

/// Lets the sum of the losses, the last thing that a step asks of its device, begin only when the gate opens.
class GatedNccl final : public ForwardingNccl {
 public:
  GatedNccl(std::shared_ptr<detail::NcclApi> inner, const testing::NcclEmulation& emulation)
      : ForwardingNccl(std::move(inner)), emulation_(emulation) {}
  void all_reduce(void* data, std::size_t count, at::ScalarType dtype, Reduce reduce, detail::NcclComm comm,
                  detail::DeviceStream stream) override {
    const std::lock_guard lock(mutex_);
    if (gate_ && dtype == at::kDouble && count == kMicroBatches)
      emulation_.run(stream, [gate = gate_] { gate->wait(); });
    inner_->all_reduce(data, count, dtype, reduce, comm, stream);
  }
  /// Null: none.
  void set_gate(std::shared_ptr<std::latch> gate) {
    const std::lock_guard lock(mutex_);
    gate_ = std::move(gate);
  }

 private:
  const testing::NcclEmulation& emulation_;
  std::mutex mutex_;
  std::shared_ptr<std::latch> gate_;
};

struct AsynchronousRank {
  DualPipe& pipe;
  Lagging& device;
  GatedNccl& nccl;
  const testing::NcclEmulation& emulation;
};

Batch batch_of(std::uint64_t seed) { return random_batch(2 * kMicroBatches, seed); }

Reference truth_of(std::uint64_t seed) {
  return reference(layer, kRanks, batch_of(seed), kMicroBatches, squared_error(), 1.0 / kMicroBatches);
}

/// One synchronous step's worth of warm-up is behind each rank when `body` gets it.
void run_asynchronous(const std::function<void(const AsynchronousRank&)>& body) {
  const testing::NcclEmulation emulation(kRanks);
  std::vector<std::shared_ptr<GatedNccl>> gated(kRanks);
  run_emulated(
      emulation, kRanks, {.timeout = 20s},
      [&](const EmulatedRank& rank) {
        const auto lagging = std::make_shared<Lagging>(rank.communicator, std::make_shared<AsyncRank>(rank));
        DualPipe pipe(lagging, DualPipeOptions{.num_micro_batches = kMicroBatches, .asynchronous = true},
                      as_factory(layer));
        pipe->step(batch_of(1), squared_error()).wait();
        lagging->write_results_late();
        lagging->asked();
        body({pipe, *lagging, *gated[static_cast<std::size_t>(lagging->rank())], emulation});
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
        nccl = gated[static_cast<std::size_t>(rank)] = std::make_shared<GatedNccl>(nccl, emulation);
      });
  expect_clean(emulation);
}

void expect_losses(const StepResult& result, const Reference& truth) {
  const std::vector<double> losses = result.micro_batch_losses();
  double sum = 0;
  for (std::size_t m = 0; m < losses.size(); ++m) {
    EXPECT_NEAR(losses[m], truth.losses[m], 1e-12);
    sum += truth.losses[m];
  }
  EXPECT_NEAR(result.loss.item<double>(), sum / kMicroBatches, 1e-12);
}

TEST(Asynchronous, AStepIsOverBeforeItsDeviceIs) {
  run_asynchronous([](const AsynchronousRank& rank) {
    for (std::uint64_t seed = 2; seed < 5; ++seed) {
      const auto gate = std::make_shared<std::latch>(1);
      rank.nccl.set_gate(gate);
      rank.pipe->zero_grad();
      const StepResult result = rank.pipe->step(batch_of(seed), squared_error());
      EXPECT_TRUE(std::isnan(result.loss.item<double>()));
      const Asked asked = rank.device.asked();
      EXPECT_EQ(asked.host_waits, asked.receives) << "the host of this test computes, and so reads what it receives";
      gate->count_down();
      const StepResult copy = result;
      copy.wait();
      const Reference truth = truth_of(seed);
      expect_losses(result, truth);
      expect_gradients(rank.pipe, truth);
      result.wait();
    }
  });
}

TEST(Asynchronous, StepsFollowOneAnotherWithoutAWait) {
  run_asynchronous([](const AsynchronousRank& rank) {
    std::vector<StepResult> results;
    for (std::uint64_t seed = 2; seed < 8; ++seed) {
      rank.pipe->zero_grad();
      results.push_back(rank.pipe->step(batch_of(seed), squared_error()));
    }
    for (std::uint64_t seed = 2; seed < 8; ++seed) expect_losses(results[seed - 2], truth_of(seed));
    expect_gradients(rank.pipe, truth_of(7));
    expect_losses(rank.pipe->evaluate(batch_of(9), squared_error()), truth_of(9));
  });
}

TEST(Asynchronous, WhatTheDeviceFailsInLaterIsFoundByWaitAndByTheNextStep) {
  for (const bool waits : {true, false}) {
    std::atomic<int> failed{0};
    std::latch stepped(kRanks);
    run_asynchronous([&](const AsynchronousRank& rank) {
      const auto gate = std::make_shared<std::latch>(1);
      rank.nccl.set_gate(gate);
      rank.pipe->zero_grad();
      const StepResult result = rank.pipe->step(batch_of(2), squared_error());
      stepped.arrive_and_wait();
      if (rank.device.rank() == 1) rank.emulation.break_down(1, "the link is down");
      const auto what = AllOf(HasSubstr("rank 1: NCCL: the link is down"), HasSubstr("go back to a checkpoint"));
      if (waits) {
        EXPECT_THAT(message_of([&] { result.wait(); }), what);
      } else {
        while (message_of([&] { rank.device.fence(); }).empty()) std::this_thread::sleep_for(1ms);
      }
      EXPECT_THAT(message_of([&] { rank.pipe->step(batch_of(3), squared_error()); }), what);
      EXPECT_THAT(message_of([&] { rank.pipe->step(batch_of(3), squared_error()); }), HasSubstr("earlier step failed"));
      gate->count_down();
      ++failed;
    });
    EXPECT_EQ(failed, kRanks);
  }
}

TEST(Asynchronous, WhatUserCodeThrowsLeavesGradientsAsTheyWere) {
  std::atomic<int> failed{0};
  run_asynchronous([&](const AsynchronousRank& rank) {
    Tensors before;
    for (const at::Tensor& parameter : rank.pipe->parameters()) before.push_back(parameter.grad().clone());
    int calls = 0;
    const LossFn fails = [&](const Tensors& outputs, const Tensors& targets) {
      if (rank.device.rank() == 0 && ++calls == kMicroBatches / 2) throw std::domain_error("the loss is not a number");
      return squared_error()(outputs, targets);
    };
    EXPECT_THAT(message_of([&] { rank.pipe->step(batch_of(2), fails); }), HasSubstr("the loss is not a number"));
    std::size_t i = 0;
    for (const at::Tensor& parameter : rank.pipe->parameters())
      EXPECT_TRUE(torch::equal(parameter.grad(), before[i++]));
    ++failed;
  });
  EXPECT_EQ(failed, kRanks);
}

TEST(Asynchronous, ChangesNothingOnTheCpu) {
  const Reference truth = truth_of(1);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> communicator) {
    DualPipe pipe(communicator, DualPipeOptions{.num_micro_batches = kMicroBatches, .asynchronous = true},
                  as_factory(layer));
    for (int step = 1; step <= 2; ++step) {
      const StepResult result = pipe->step(batch_of(1), squared_error());
      EXPECT_FALSE(std::isnan(result.loss.item<double>()));
      expect_losses(result, truth);
      expect_gradients(pipe, truth, 1e-12, step);
    }
  });
}

}  // namespace
}  // namespace dualpipe::test
