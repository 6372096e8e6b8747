// Runs on every rank of a launch on GPUs; launch_test.cpp starts it. Each process compares with its own reference.
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <iostream>

#include "dualpipe/comm/nccl.hpp"
#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/planner/report.hpp"
#include "gpu/checks.hpp"

namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;
using namespace std::chrono_literals;

bool shares_device() { return std::getenv("DUALPIPE_TEST_SHARE_DEVICE") != nullptr; }

Ptr connect(const std::string& name, bool communicator_per_edge = false) {
  const World world = World::from_env();
  const bool share = shares_device();
  return connect_nccl(world, {.connect = {.name = name, .timeout = 60s},
                              .device = share ? 0 : -1,
                              .communicator_per_edge = communicator_per_edge,
                              .share_devices = share});
}

TEST(GpuRank, Fp32TrainsAsOneProcess) { trains_as_one_process(connect("fp32"), torch::kFloat, 1e-4); }
TEST(GpuRank, Bf16TrainsAsOneProcess) { trains_as_one_process(connect("bf16"), torch::kBFloat16, 5e-2); }
TEST(GpuRank, ACommunicatorPerEdgeTrainsAsOneProcess) {
  trains_as_one_process(connect("edges", true), torch::kFloat, 1e-4);
}

TEST(GpuRank, ASideStreamOfTheCallerIsAsGood) {
  const auto comm = connect("stream");
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool(false, comm->device().index()));
  trains_as_one_process(comm, torch::kFloat, 1e-4);
}

TEST(GpuRank, TensorsOf64MiBCrossBothWays) {
  const auto comm = connect("large");
  if (comm->size() < 2) GTEST_SKIP() << "needs two ranks";
  tensors_of_64_mib_cross_both_ways(comm);
}

TEST(GpuRank, CollectivesMatchTheClosedForm) { collectives_match_the_closed_form(connect("collectives")); }

TEST(GpuRank, MemoryIsFlatOver100Steps) { memory_is_flat_over_100_steps(connect("flat"), false); }

TEST(GpuRank, AnAbortInTheMiddleOfAStepLeavesParametersAndGradients) {
  an_abort_leaves_parameters_and_gradients(connect("abort"));
}

/// Rank 0 waits for an all_to_all that nobody else comes to, and sends what would follow from it.
TEST(GpuRank, AnAbortEndsTransfersThatWaitForACollective) {
  const auto comm = connect("abort_exchange");
  if (comm->size() < 2) GTEST_SKIP() << "needs two ranks";
  comm->connect({{0, 1}, {1, 0}});
  const auto size = static_cast<std::size_t>(comm->size());
  Pending sent;
  if (comm->rank() == 0) {
    const Tensors outgoing(size, torch::ones({1 << 20}, comm->device()));
    const Signature expected(size, {.dtype = torch::kFloat, .sizes = {1 << 20}});
    const Tensors mixed = comm->all_to_all(outgoing, expected).take();
    sent = comm->send(1, {mixed[1] + 1});
  }
  comm->barrier().wait();
  if (comm->rank() == 1) comm->abort("enough");
  torch::cuda::synchronize(comm->device().index());  // returns, as the abort ends what never would
  EXPECT_THAT(message_of([&] { comm->barrier().wait(); }), HasSubstr("enough"));
  if (comm->rank() == 0) {
    EXPECT_THAT(message_of([&] { sent.wait(); }), HasSubstr("enough"));
  }
}

/// While it lives, LibTorch throws where the host would wait for a device.
class NoWaits {
 public:
  NoWaits() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR); }
  ~NoWaits() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED); }
};

TEST(GpuRank, TheOnlyWaitOfAStepIsItsCommit) {
  const auto comm = connect("waits");
  for (const bool asynchronous : {false, true}) {
    const int num_micro_batches = 2 * comm->size();
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches, .asynchronous = asynchronous},
                  as_factory(layers_of(64, torch::kFloat)));
    Batch batch = batch_of(4 * num_micro_batches, 64, torch::kFloat);
    for (at::Tensor& target : batch.targets) target = target.to(comm->device());
    const std::vector<double> first = pipe->step(batch, squared_error()).micro_batch_losses();  // compares batches
    std::vector<StepResult> results;
    {
      const NoWaits no_waits;  // the commit asks for the device's progress, which is no wait to LibTorch
      for (int step = 0; step < 5; ++step) results.push_back(pipe->step(batch, squared_error()));
    }
    for (const StepResult& result : results) EXPECT_EQ(result.micro_batch_losses(), first);
  }
}

/// Stages that compute far longer than their boundaries take, on any link between devices.
TEST(GpuRank, TransfersRunUnderCompute) {
  if (shares_device()) GTEST_SKIP() << "ranks that share a device wait for each other's compute";
  const auto comm = connect("hidden");
  if (comm->size() < 2) GTEST_SKIP() << "needs two ranks";
  const int width = 4096;
  const int num_micro_batches = 8 * comm->size();
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches},
                as_factory(layers_of(width, torch::kBFloat16, /*linears_per_stage=*/4)));
  const auto tracer = std::make_shared<Tracer>(comm->rank());
  pipe->add_observer(tracer);
  const Batch batch = batch_of(512 * num_micro_batches, width, torch::kBFloat16, comm->device());
  for (int step = 0; step < 4; ++step) {  // the first ones load kernels
    pipe->zero_grad();
    pipe->step(batch, squared_error());
  }
  const Timeline timeline = gather(*comm, tracer->last());
  const auto main = planner::main_part(timeline);
  ASSERT_TRUE(main) << "all ranks have pairs at the same time";
  const planner::Overlap transfers = planner::report(timeline, *main).total().transfers;
  if (comm->rank() == 0)
    std::cout << "main part: " << 1e3 * transfers.total() << " ms of transfers, "
              << 100 * transfers.hidden / transfers.total() << " % under compute\n";
  EXPECT_GT(transfers.total(), 0);
  EXPECT_GT(transfers.hidden, 0.5 * transfers.total());
}

TEST(GpuRank, ATensorOfAnotherDeviceIsRefused) {
  const auto comm = connect("device");
  if (comm->size() < 2) GTEST_SKIP() << "needs two ranks";
  const int peer = comm->rank() == 0 ? 1 : 0;
  EXPECT_THAT(message_of([&] { comm->send(peer, {torch::ones({2})}); }), HasSubstr("tensor 0 is on cpu"));
  comm->barrier().wait();
}

}  // namespace
}  // namespace dualpipe::test
