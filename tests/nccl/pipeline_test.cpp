#include "pipeline/pipeline.hpp"

#include <gmock/gmock.h>

#include <mutex>

#include "lagging.hpp"

// DualPipe over the NCCL communicator: same code as on the CPU, on devices that lag behind their hosts.
namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;
using namespace std::chrono_literals;

const bool poisoned = [] {
  testing::poison_freed_memory();
  return true;
}();

struct Setting {
  int num_ranks = 2;
  int num_micro_batches = 4;
  std::string schedule = "dualpipe";
  bool communicator_per_edge = false;
  bool one_transfer_at_a_time = false;
  std::uint64_t seed = 1;
};

using Body = std::function<void(DualPipe&, const std::shared_ptr<Communicator>&)>;

void run_pipeline(const Setting& setting, const Body& body, const Decorate& decorate = nullptr,
                  std::chrono::milliseconds timeout = 30s) {
  const testing::NcclEmulation emulation(
      setting.num_ranks, {.seed = setting.seed, .one_transfer_at_a_time = setting.one_transfer_at_a_time});
  run_emulated(
      emulation, setting.num_ranks, {.timeout = timeout, .communicator_per_edge = setting.communicator_per_edge},
      [&](const EmulatedRank& rank) {
        const auto lagging = std::make_shared<Lagging>(rank.communicator, std::make_shared<AsyncRank>(rank));
        DualPipe pipe(lagging,
                      DualPipeOptions{.num_micro_batches = setting.num_micro_batches, .schedule = setting.schedule},
                      as_factory(layer));
        body(pipe, lagging);
      },
      decorate);
  expect_clean(emulation);
}

int num_stages(const Setting& setting) {
  return setting.schedule == "dualpipev" ? 2 * setting.num_ranks : setting.num_ranks;
}

class EmulatedPipeline : public ::testing::TestWithParam<Setting> {};

TEST_P(EmulatedPipeline, TrainsAsOneProcess) {
  const Setting& setting = GetParam();
  const int rows = 2 * setting.num_micro_batches;
  const Batch batch = random_batch(rows, 5);
  const Reference expected = reference(layer, num_stages(setting), batch, setting.num_micro_batches, squared_error(),
                                       1.0 / setting.num_micro_batches);
  run_pipeline(setting, [&](DualPipe& pipe, const auto&) {
    for (int step = 1; step <= 2; ++step) {
      const StepResult result = pipe->step(batch, squared_error());
      const std::vector<double> losses = result.micro_batch_losses();
      ASSERT_EQ(losses.size(), expected.losses.size());
      for (std::size_t m = 0; m < losses.size(); ++m) EXPECT_NEAR(losses[m], expected.losses[m], 1e-12);
      expect_gradients(pipe, expected, 1e-12, step);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(
    Ranks, EmulatedPipeline,
    ::testing::Values(Setting{.num_ranks = 2, .num_micro_batches = 4}, Setting{.num_ranks = 4, .num_micro_batches = 8},
                      Setting{.num_ranks = 8, .num_micro_batches = 16},
                      Setting{.num_ranks = 4, .num_micro_batches = 8, .communicator_per_edge = true},
                      Setting{.num_ranks = 8, .num_micro_batches = 16, .one_transfer_at_a_time = true},
                      Setting{.num_ranks = 4, .num_micro_batches = 8, .schedule = "dualpipev"}),
    [](const auto& tested) {
      const Setting& s = tested.param;
      return s.schedule + std::to_string(s.num_ranks) + (s.communicator_per_edge ? "PerEdge" : "") +
             (s.one_transfer_at_a_time ? "OneAtATime" : "");
    });

TEST(EmulatedPipeline, AStepReadsNothingFromTheDeviceButItsData) {
  const Setting setting{.num_ranks = 4, .num_micro_batches = 8};
  const Batch batch = random_batch(2 * setting.num_micro_batches, 5);
  run_pipeline(setting, [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
    pipe->step(batch, squared_error());
    auto& lagging = static_cast<Lagging&>(*communicator);
    lagging.asked();
    pipe->step(batch, squared_error());
    const Asked asked = lagging.asked();
    // The host of this test computes, and so reads what was received and the gradients. What is left is the commit.
    EXPECT_EQ(asked.host_waits, asked.receives + 2);
    ASSERT_EQ(asked.collectives, 2);
    Signature gradients;
    for (const at::Tensor& parameter : pipe->parameters())
      gradients.push_back({.dtype = at::kDouble, .sizes = parameter.sizes().vec()});
    EXPECT_EQ(to_string(asked.collected[0]), to_string(gradients));
    EXPECT_EQ(to_string(asked.collected[1]), "[float64 [8]]") << "the losses";
  });
}

/// All gradients of one step, by rank and in the order of the parameters.
std::vector<std::vector<at::Tensor>> gradients_of(const Setting& setting) {
  std::vector<std::vector<at::Tensor>> gradients(static_cast<std::size_t>(setting.num_ranks));
  const Batch batch = random_batch(2 * setting.num_micro_batches, 5);
  run_pipeline(setting, [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
    pipe->step(batch, squared_error());
    for (const at::Tensor& parameter : pipe->parameters())
      gradients[static_cast<std::size_t>(communicator->rank())].push_back(parameter.grad().clone());
  });
  return gradients;
}

class Repetitions : public ::testing::TestWithParam<int> {};

TEST_P(Repetitions, AnyDelaysGiveTheSameBits) {
  const auto first = gradients_of({.seed = 1});
  for (int i = 0; i < 25; ++i) {
    const auto seed = static_cast<std::uint64_t>(100 * (GetParam() + 1) + i);
    const auto again = gradients_of({.seed = seed});
    for (std::size_t r = 0; r < first.size(); ++r)
      for (std::size_t p = 0; p < first[r].size(); ++p)
        ASSERT_TRUE(torch::equal(first[r][p], again[r][p])) << "seed " << seed << ", rank " << r << ", parameter " << p;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, Repetitions, ::testing::Range(0, 8));

// ---------------------------------------------------------------------------------------------------------------------
// failures

Batch rows_for(const Setting& setting) { return random_batch(2 * setting.num_micro_batches, 5); }

TEST(EmulatedFailure, AnErrorInUserCodeLeavesGradientsAndEndsAllRanks) {
  const Setting setting{.num_ranks = 4, .num_micro_batches = 8};
  std::atomic<int> failed{0};
  run_pipeline(setting, [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
    pipe->step(rows_for(setting), squared_error());
    Tensors before;
    for (const at::Tensor& parameter : pipe->parameters()) before.push_back(parameter.grad().clone());
    std::atomic<int> calls{0};
    const LossFn fails = [&](const Tensors& outputs, const Tensors& targets) {
      if (communicator->rank() == 0 && ++calls == 2) throw std::domain_error("the loss is not a number");
      return squared_error()(outputs, targets);
    };
    EXPECT_THAT(message_of([&] { pipe->step(rows_for(setting), fails); }), HasSubstr("the loss is not a number"));
    std::size_t i = 0;
    for (const at::Tensor& parameter : pipe->parameters())
      EXPECT_TRUE(torch::equal(parameter.grad(), before[i++])) << "a gradient has changed";
    EXPECT_THAT(message_of([&] { pipe->step(rows_for(setting), squared_error()); }), HasSubstr("earlier step failed"));
    ++failed;
  });
  EXPECT_EQ(failed, 4);
}

TEST(EmulatedFailure, AnErrorOfNcclInTheBackgroundEndsAllRanksAndSaysWhatItWas) {
  const Setting setting{.num_ranks = 2, .num_micro_batches = 4};
  const testing::NcclEmulation emulation(setting.num_ranks);
  std::atomic<int> failed{0};
  run_emulated(emulation, setting.num_ranks, {.timeout = 30s}, [&](const EmulatedRank& rank) {
    DualPipe pipe(rank.communicator, DualPipeOptions{.num_micro_batches = setting.num_micro_batches},
                  as_factory(layer));
    pipe->step(rows_for(setting), squared_error());
    if (rank.communicator->rank() == 1) emulation.break_down(1, "unhandled system error: the network is down");
    const std::string message = message_of([&] {
      for (int i = 0; i < 10'000; ++i) {
        pipe->step(rows_for(setting), squared_error());
        std::this_thread::sleep_for(1ms);
      }
    });
    EXPECT_THAT(message, HasSubstr("rank 1: NCCL: unhandled system error: the network is down"));
    ++failed;
  });
  EXPECT_EQ(failed, 2);
  expect_clean(emulation);
}

/// From some moment on, sends that never meet their receives.
class StuckNccl final : public ForwardingNccl {
 public:
  using ForwardingNccl::ForwardingNccl;
  void send(const void* data, std::size_t bytes, int peer, detail::NcclComm comm,
            detail::DeviceStream stream) override {
    // One byte too many: to this rank's peer it is as if the data never came.
    inner_->send(data, stuck ? bytes + 1 : bytes, peer, comm, stream);
  }
  std::atomic<bool> stuck{false};
};

TEST(EmulatedFailure, ADeviceThatHangsMeetsTheDeadlineAndNothingIsCommitted) {
  const Setting setting{.num_ranks = 2, .num_micro_batches = 4};
  const testing::NcclEmulation emulation(setting.num_ranks);
  std::shared_ptr<StuckNccl> stuck;
  std::atomic<int> failed{0};
  run_emulated(
      emulation, setting.num_ranks, {.timeout = 300ms},
      [&](const EmulatedRank& rank) {
        const auto lagging = std::make_shared<Lagging>(rank.communicator, std::make_shared<AsyncRank>(rank));
        DualPipe pipe(lagging, DualPipeOptions{.num_micro_batches = setting.num_micro_batches}, as_factory(layer));
        pipe->step(rows_for(setting), squared_error());
        Tensors before;
        for (const at::Tensor& parameter : pipe->parameters()) before.push_back(parameter.grad().clone());
        lagging->barrier().wait();
        if (rank.communicator->rank() == 0) stuck->stuck = true;
        lagging->barrier().wait();
        const auto begin = std::chrono::steady_clock::now();
        EXPECT_THAT(message_of([&] { pipe->step(rows_for(setting), squared_error()); }),
                    HasSubstr("longer than the timeout of 300 ms"));
        EXPECT_LT(std::chrono::steady_clock::now() - begin, 5s);
        std::size_t i = 0;
        for (const at::Tensor& parameter : pipe->parameters())
          EXPECT_TRUE(torch::equal(parameter.grad(), before[i++])) << "a gradient has changed";
        ++failed;
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
        if (rank == 0) nccl = stuck = std::make_shared<StuckNccl>(nccl);
      });
  EXPECT_EQ(failed, 2);
  EXPECT_FALSE(emulation.violations().empty()) << "the sizes did not match";
}

TEST(EmulatedFailure, AForgottenEventIsCaughtInAStep) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "data races are the point";
#endif
  const Setting setting{.num_ranks = 2, .num_micro_batches = 4};
  const Batch batch = rows_for(setting);
  const Reference expected = reference(layer, 2, batch, setting.num_micro_batches, squared_error(), 0.25);
  std::atomic<int> wrong{0};
  const auto step = [&](DualPipe& pipe, const auto&) {
    const std::vector<double> losses = pipe->step(batch, squared_error()).micro_batch_losses();
    for (std::size_t m = 0; m < losses.size(); ++m)
      if (!(std::abs(losses[m] - expected.losses[m]) < 1e-9)) ++wrong;
  };
  const auto forgets = [](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
    if (rank == 1)
      device = std::make_shared<ForgetfulDevice>(device, ForgetfulDevice::Forgets::to_wait_for_the_transfer);
  };
  // What it read too early may have been what ranks compare before the first step.
  const std::string message = message_of([&] { run_pipeline(setting, step, forgets); });
  EXPECT_TRUE(wrong > 0 || message.find("disagree") != std::string::npos) << message;
}

}  // namespace
}  // namespace dualpipe::test
