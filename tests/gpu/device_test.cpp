// What one device, or none, can show.
#include <c10/cuda/CUDAFunctions.h>
#include <gmock/gmock.h>
#include <torch/torch.h>

#include <memory>
#include <thread>
#include <vector>

#include "dualpipe/comm/local.hpp"
#include "dualpipe/comm/nccl.hpp"
#include "dualpipe/stage/stage_run.hpp"
#include "nccl/cuda.hpp"
#if defined(DUALPIPE_LM)
#include "model.hpp"
#endif

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(GpuMissing, AMachineWithoutADeviceSaysSoOnEveryRank) {
  std::string why;
  if (detail::cuda_device_count(why) > 0) GTEST_SKIP() << "there is a device";
  EXPECT_FALSE(why.empty());
  try {
    connect_nccl(World{});
    ADD_FAILURE() << "nothing was thrown";
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("rank 0: no CUDA device (" + why), HasSubstr("connect_sockets")));
  }
}

TEST(GpuMissing, WrongOptionsComeFirst) {
  EXPECT_THROW(connect_nccl(World{}, {.max_transfer_ctas = -1}), InvalidArgument);
  EXPECT_THROW(connect_nccl(World{}, {.max_collective_ctas = 2, .min_ctas = 4}), InvalidArgument);
}

TEST(NcclLibrary, IsTheOneOfLibTorchAndMakesIdsWithoutADevice) {
  const auto nccl = detail::nccl_library(0);  // throws if an older one was loaded
  EXPECT_NE(nccl->unique_id(), nccl->unique_id());
}

class OneGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (detail::cuda_device_count(why) < 1) GTEST_SKIP() << "no CUDA device: " << why;
    device_ = detail::cuda_device(0);
    nccl_ = detail::nccl_library(0);
  }
  std::shared_ptr<detail::DeviceApi> device_;
  std::shared_ptr<detail::NcclApi> nccl_;
};

TEST_F(OneGpu, HasADevice) {
  EXPECT_EQ(device_->device(), at::Device(at::kCUDA, 0));
  EXPECT_EQ(detail::cuda_device_identity(0).size(), 32u);
}

TEST_F(OneGpu, ACommunicatorOfOneRankSendsToItself) {
  const auto comm = nccl_->init(1, nccl_->unique_id(), 0, {.name = "self"});
  const auto stream = device_->create_stream();
  const auto ready = device_->create_event(/*timed=*/false);
  const auto end = device_->create_event(/*timed=*/false);
  const auto sent = torch::arange(1 << 20, torch::device(torch::kCUDA).dtype(torch::kFloat));
  const at::Tensor got = device_->empty(sent.sizes(), sent.scalar_type(), device_->current_stream());
  device_->record(ready, device_->current_stream());
  device_->wait(stream, ready);
  nccl_->group_start();
  nccl_->send(sent.const_data_ptr(), sent.nbytes(), 0, comm, stream);
  nccl_->receive(got.mutable_data_ptr(), got.nbytes(), 0, comm, stream);
  nccl_->group_end();
  device_->record(end, stream);
  device_->wait(device_->current_stream(), end);
  EXPECT_TRUE(torch::equal(got, sent));
  EXPECT_TRUE(device_->done(end));
  EXPECT_FALSE(nccl_->async_error(comm));
  nccl_->destroy(comm);
  device_->destroy(ready);
  device_->destroy(end);
  device_->destroy(stream);
}

TEST_F(OneGpu, AStreamWritesAFlagAndWaitsForOne) {
  const auto flags = device_->create_flags(2);
  const auto stream = device_->create_stream();
  const auto end = device_->create_event(/*timed=*/false);
  device_->write_flag(stream, flags[0], 7);
  device_->wait_for_flag(stream, flags[1], 3);
  device_->record(end, stream);
  while (flags[0] != 7) std::this_thread::yield();
  for (const std::uint32_t too_small : {1U, 2U}) {
    flags[1] = too_small;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_FALSE(device_->done(end));
  }
  flags[1] = 3 + (1U << 30);
  while (!device_->done(end)) std::this_thread::yield();
  device_->destroy(end);
  device_->destroy(stream);
}

TEST_F(OneGpu, EventsTellTheTimeOfTheHostsClock) {
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  const auto event = device_->create_event(/*timed=*/true);
  for (int i = 0; i < 3; ++i) {
    const double before = now();
    device_->record(event, device_->current_stream());
    while (!device_->done(event)) std::this_thread::yield();
    const double after = now();
    EXPECT_GE(device_->time_of(event), before - 1e-3);
    EXPECT_LE(device_->time_of(event), after + 1e-3);
  }
  device_->destroy(event);
}

#if defined(DUALPIPE_LM)
TEST_F(OneGpu, LayersWithExpertsReadNothingButTheSplitsOfADispatch) {
  const auto group = local_communicators(1, {.device = at::kCUDA})[0];
  moe::ModelSize size;
  size.transformer.layers = 2;
  std::vector<Stage> stages;
  for (const NamedLayer& layer : moe::layers_of(size, 1, group)) {
    stages.push_back(layer.make());
    stages.back().module()->to(group->device());
  }
  const auto text = torch::zeros({2, size.transformer.context}, at::device(group->device()).dtype(at::kLong));
  const StageLoss loss = [](const Tensors& outputs) { return outputs[0].square().mean() + outputs[1].sum(); };
  const auto gradient = torch::ones({}, group->device());
  auto& waits = c10::cuda::warning_state();
  for (int micro_batch = 0; micro_batch < 2; ++micro_batch) {
    // The first brings to the device what modules keep elsewhere. The wait for splits is one for an event, which
    // LibTorch does not see.
    if (micro_batch == 1) waits.set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR);
    try {
      Tensors values{text};
      std::vector<std::unique_ptr<StageRun>> runs;
      for (const Stage& stage : stages) {
        runs.push_back(std::make_unique<StageRun>(stage, values, StageContext{.micro_batch = micro_batch},
                                                  &stage == &stages.back() ? loss : nullptr));
        while (!runs.back()->advanced()) runs.back()->advance();
        runs.back()->finish_forward();
        values = runs.back()->outputs();
      }
      Tensors gradients{gradient};
      for (std::size_t s = runs.size(); s-- > 0;) gradients = runs[s]->backward(gradients);
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
  }
  waits.set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
}
#endif

}  // namespace
}  // namespace dualpipe
