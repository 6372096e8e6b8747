// Ranks that are threads. OneGpuRanks share one device through the local communicator: no NCCL, one process, so that
// debuggers and compute-sanitizer see all of it. NcclThreads have NCCL between them.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <mutex>
#include <optional>
#include <set>

#include "gpu/checks.hpp"
#include "nccl/communicator.hpp"
#include "nccl/cuda.hpp"
#include "nccl/rank_device.hpp"

namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;
using namespace std::chrono_literals;

/// Which streams are current on the ranks.
enum class Streams { one, own };

void PrintTo(Streams streams, std::ostream* out) { *out << (streams == Streams::one ? "one stream" : "own streams"); }

class OneGpuRanks : public ::testing::TestWithParam<Streams> {
 protected:
  void SetUp() override {
    std::string why;
    if (detail::cuda_device_count(why) < 1) GTEST_SKIP() << "no CUDA device: " << why;
  }

  static void run(int num_ranks, const std::function<void(Ptr)>& body) {
    run_ranks(num_ranks,
              [&](Ptr comm) {
                std::optional<c10::cuda::CUDAStreamGuard> guard;
                if (GetParam() == Streams::own)
                  guard.emplace(c10::cuda::getStreamFromPool(false, comm->device().index()));
                body(comm);
                torch::cuda::synchronize(comm->device().index());
              },
              {.timeout = 60s, .device = at::kCUDA});
  }
};

TEST_P(OneGpuRanks, KnowTheirDeviceAndStreams) {
  std::mutex mutex;
  std::set<c10::StreamId> streams;
  run(4, [&](const Ptr& comm) {
    EXPECT_EQ(comm->device(), at::Device(at::kCUDA, comm->device().index()));
    EXPECT_EQ(torch::ones({1}, at::kCUDA).device(), comm->device());
    const std::lock_guard lock(mutex);
    streams.insert(c10::cuda::getCurrentCUDAStream().id());
  });
  EXPECT_EQ(streams.size(), GetParam() == Streams::own ? 4u : 1u);
}

TEST_P(OneGpuRanks, TwoTrainInFp32AsOneProcess) {
  run(2, [](const Ptr& comm) { trains_as_one_process(comm, torch::kFloat, 1e-4); });
}
TEST_P(OneGpuRanks, FourTrainInFp32AsOneProcess) {
  run(4, [](const Ptr& comm) { trains_as_one_process(comm, torch::kFloat, 1e-4); });
}
TEST_P(OneGpuRanks, TwoTrainInBf16AsOneProcess) {
  run(2, [](const Ptr& comm) { trains_as_one_process(comm, torch::kBFloat16, 5e-2); });
}
TEST_P(OneGpuRanks, FourTrainInBf16AsOneProcess) {
  run(4, [](const Ptr& comm) { trains_as_one_process(comm, torch::kBFloat16, 5e-2); });
}

TEST_P(OneGpuRanks, CollectivesMatchTheClosedForm) { run(4, collectives_match_the_closed_form); }
TEST_P(OneGpuRanks, TensorsOf64MiBCrossBothWays) { run(2, tensors_of_64_mib_cross_both_ways); }

TEST_P(OneGpuRanks, MemoryIsFlatOver100Steps) {
  run(2, [](const Ptr& comm) { memory_is_flat_over_100_steps(comm, /*shared=*/true); });
}

TEST_P(OneGpuRanks, AnAbortInTheMiddleOfAStepLeavesParametersAndGradients) {
  run(2, an_abort_leaves_parameters_and_gradients);
}

/// Each end gives its memory back while the other is still behind with its work on it.
TEST_P(OneGpuRanks, MemoryIsReusedOnlyAfterTheOtherEndIsThrough) {
  const int rounds = 50;
  run(2, [&](const Ptr& comm) {
    const auto options = torch::device(comm->device());
    std::vector<at::Tensor> wrong;
    for (int k = 0; k < rounds; ++k) {
      if (comm->rank() == k % 2) {
        Pending sent = comm->send(1 - comm->rank(), {torch::full({1 << 20}, 1.0F * k, options) + busy(comm->device())});
        sent.wait();
        sent = Pending();
        for (int i = 0; i < 4; ++i) torch::full({1 << 20}, -1.0F, options);  // into what was given back
      } else {
        at::Tensor got = comm->receive(1 - comm->rank()).take().at(0);
        wrong.push_back((got + busy(comm->device()) != k).sum());
        got = at::Tensor();
        for (int i = 0; i < 4; ++i) torch::full({1 << 20}, -2.0F, options);
      }
    }
    for (std::size_t i = 0; i < wrong.size(); ++i) EXPECT_EQ(wrong[i].item<std::int64_t>(), 0) << "receive " << i;
  });
}

TEST_P(OneGpuRanks, MemoryChangesHandsOnlyBetweenThreadsWithOneStream) {
  std::array<void*, 2> address{};
  run(2, [&](const Ptr& comm) {
    if (comm->rank() == 0) {
      Tensors tensors;  // in braces it would be copied, and held by this statement too
      tensors.push_back(torch::arange(1000, torch::device(comm->device())));
      address[0] = tensors[0].data_ptr();
      Pending sent = comm->send(1, std::move(tensors));
      sent.wait();
    } else {
      const at::Tensor got = comm->receive(0).take().at(0);
      address[1] = got.data_ptr();
      EXPECT_TRUE(torch::equal(got.cpu(), torch::arange(1000)));
    }
    comm->barrier().wait();
  });
  EXPECT_EQ(address[0] == address[1], GetParam() == Streams::one);
}

TEST_P(OneGpuRanks, ATensorOfAnotherDeviceIsRefused) {
  run(2, [](const Ptr& comm) {
    EXPECT_THAT(message_of([&] { comm->send(1 - comm->rank(), {torch::ones({2})}); }),
                ::testing::AllOf(HasSubstr("tensor 0 of the message is on cpu"), HasSubstr("cuda:")));
    comm->barrier().wait();
  });
}

INSTANTIATE_TEST_SUITE_P(OneGpu, OneGpuRanks, ::testing::Values(Streams::one, Streams::own),
                         [](const auto& tested) { return tested.param == Streams::one ? "OneStream" : "OwnStreams"; });

// NCCL reads it once.
[[maybe_unused]] const int sharing = ::setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", /*overwrite=*/0);

/// What ranks agree on goes from thread to thread, tensors over NCCL: between devices, or on the one that they share.
class NcclThreads : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    std::string why;
    devices_ = detail::cuda_device_count(why);
    if (devices_ < 1) GTEST_SKIP() << "no CUDA device: " << why;
    if (devices_ >= GetParam()) return;
    const std::string same = detail::cuda_device_identity(0);
    const std::string obstacle =
        detail::sharing_obstacle({same, same}, detail::nccl_version(), std::getenv("NCCL_MULTI_RANK_GPU_ENABLE"));
    if (!obstacle.empty()) GTEST_SKIP() << obstacle;
  }

  void trains_as_one_process(at::ScalarType dtype, double tolerance) const {
    // Loads the kernels: CUDA may wait for the device before it loads one, so for a receive that waits.
    run_ranks(GetParam(), [&](Ptr comm) { test::trains_as_one_process(comm, dtype, tolerance); },
              {.timeout = 60s, .device = at::kCUDA});
    run_ranks(
        GetParam(),
        [&](const Ptr& control) {
          const int index = control->rank() % devices_;
          const c10::cuda::CUDAStreamGuard guard(
              c10::cuda::getStreamFromPool(false, static_cast<at::DeviceIndex>(index)));
          test::trains_as_one_process(
              detail::NcclCommunicator::world(
                  control, detail::cuda_device(index), detail::nccl_library(index),
                  {.timeout = 60s, .name = "threads", .transfer_ctas = {.max = 4}, .collective_ctas = {.max = 4}}),
              dtype, tolerance);
          torch::cuda::synchronize(index);
        },
        {.timeout = 60s});
  }

 private:
  int devices_ = 0;
};

TEST_P(NcclThreads, TrainInFp32AsOneProcess) { trains_as_one_process(torch::kFloat, 1e-4); }
TEST_P(NcclThreads, TrainInBf16AsOneProcess) { trains_as_one_process(torch::kBFloat16, 5e-2); }

INSTANTIATE_TEST_SUITE_P(Ranks, NcclThreads, ::testing::Values(2, 4));

}  // namespace
}  // namespace dualpipe::test
