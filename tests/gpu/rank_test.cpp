// Runs on every rank of a launch on GPUs; launch_test.cpp starts it. Each process compares with its own reference.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <gmock/gmock.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdlib>

#include "dualpipe/comm/nccl.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;
using namespace std::chrono_literals;

std::shared_ptr<Communicator> connect(const std::string& name, bool communicator_per_edge = false) {
  const World world = World::from_env();
  const bool share = std::getenv("DUALPIPE_TEST_SHARE_DEVICE") != nullptr;
  return connect_nccl(world, {.connect = {.name = name, .timeout = 60s},
                              .device = share ? 0 : -1,
                              .communicator_per_edge = communicator_per_edge,
                              .share_devices = share});
}

/// Residual layers of any width and dtype; weights depend on the stage's number only.
Model layers_of(int width, at::ScalarType dtype) {
  return [=](int stage) {
    auto generator = at::detail::createCPUGenerator(1000 + static_cast<std::uint64_t>(stage));
    torch::nn::Linear linear(width, width);
    const torch::NoGradGuard no_grad;
    linear->weight.copy_(torch::randn({width, width}, generator) * (0.5 / std::sqrt(width)));
    linear->bias.zero_();
    linear->to(dtype);
    return Piece{linear.ptr(),
                 [linear](const Tensors& x) mutable { return Tensors{x[0] + torch::tanh(linear->forward(x[0]))}; }};
  };
}

Batch batch_of(int rows, int width, at::ScalarType dtype) {
  auto generator = at::detail::createCPUGenerator(7);
  Batch batch;
  batch.inputs = {torch::randn({rows, width}, generator).to(dtype)};
  batch.targets = {torch::randn({rows, width}, generator).to(dtype)};
  return batch;
}

/// Compares a step with one process on the CPU, in the same dtype.
void compare(const std::shared_ptr<Communicator>& comm, at::ScalarType dtype, double tolerance) {
  const int width = 64;
  const int num_micro_batches = 2 * comm->size();
  const Model model = layers_of(width, dtype);
  const Batch batch = batch_of(4 * num_micro_batches, width, dtype);
  const Reference expected =
      reference(model, comm->size(), batch, num_micro_batches, squared_error(), 1.0 / num_micro_batches);
  Batch on_device;
  on_device.inputs = {batch.inputs[0].to(comm->device())};
  on_device.targets = {batch.targets[0].to(comm->device())};
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches}, as_factory(model));
  for (int step = 1; step <= 2; ++step) {
    const std::vector<double> losses = pipe->step(on_device, squared_error()).micro_batch_losses();
    for (std::size_t m = 0; m < losses.size(); ++m)
      EXPECT_NEAR(losses[m], expected.losses[m], tolerance * std::abs(expected.losses[m]));
    for (const auto& child : pipe->named_children())
      for (const auto& item : child.value()->named_parameters())
        EXPECT_LE(difference(item.value().grad().cpu(),
                             expected.gradients.at(std::stoi(child.key().substr(5))).at(item.key()) * step),
                  tolerance)
            << child.key() << "." << item.key();
  }
}

TEST(GpuRank, Fp32TrainsAsOneProcess) { compare(connect("fp32"), torch::kFloat, 1e-4); }
TEST(GpuRank, Bf16TrainsAsOneProcess) { compare(connect("bf16"), torch::kBFloat16, 5e-2); }
TEST(GpuRank, ACommunicatorPerEdgeTrainsAsOneProcess) { compare(connect("edges", true), torch::kFloat, 1e-4); }

TEST(GpuRank, ASideStreamOfTheCallerIsAsGood) {
  const auto comm = connect("stream");
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool(false, comm->device().index()));
  compare(comm, torch::kFloat, 1e-4);
}

/// In the global order; far above the sizes that NCCL buffers.
TEST(GpuRank, TensorsOf64MiBCrossBothWays) {
  const auto comm = connect("large");
  if (comm->size() < 2) GTEST_SKIP() << "needs two ranks";
  const std::int64_t elements = 16 << 20;
  comm->connect({{0, 1}, {1, 0}});
  if (comm->rank() > 1) return comm->barrier().wait();
  std::vector<Pending> sends;
  for (int k = 0; k < 8; ++k) {
    const int from = k % 2;
    if (comm->rank() == from) {
      // The product is still being computed when send() is called.
      const auto slow = torch::ones({2048, 2048}, comm->device());
      auto made = torch::full({elements}, k, torch::device(comm->device()).dtype(torch::kFloat)) +
                  0 * slow.mm(slow).mm(slow)[0][0];
      sends.push_back(comm->send(1 - from, {std::move(made)}));
    } else {
      const at::Tensor got = comm->receive(from).take().at(0);
      EXPECT_EQ(got.numel(), elements);
      EXPECT_TRUE((got == k).all().item<bool>()) << "transfer " << k;
    }
  }
  for (Pending& send : sends) send.wait();
  comm->barrier().wait();
}

TEST(GpuRank, CollectivesMatchTheClosedForm) {
  const auto comm = connect("collectives");
  const int r = comm->rank();
  const int size = comm->size();
  const auto options = torch::device(comm->device());
  auto sum = torch::full({1000, 3}, r + 1.0, options);
  comm->all_reduce({sum}).wait();
  EXPECT_TRUE((sum == size * (size + 1) / 2.0).all().item<bool>());
  auto copy = torch::full({5}, r, options).t();
  comm->broadcast({copy}, size - 1).wait();
  EXPECT_TRUE((copy == size - 1).all().item<bool>());
  Tensors outgoing;
  for (int to = 0; to < size; ++to) outgoing.push_back(torch::full({r + to, 2}, 10 * r + to, options));
  const Tensors got = comm->all_to_all(outgoing).take();
  for (int from = 0; from < size; ++from) {
    ASSERT_EQ(got[static_cast<std::size_t>(from)].size(0), from + r);
    EXPECT_TRUE((got[static_cast<std::size_t>(from)] == 10 * from + r).all().item<bool>());
  }
  const auto pair = comm->split(r / 2, r);
  auto half = torch::ones({2}, options);
  pair->all_reduce({half}).wait();
  EXPECT_TRUE((half == pair->size()).all().item<bool>());
}

TEST(GpuRank, MemoryIsFlatOver100Steps) {
  const auto comm = connect("flat");
  const int width = 512;
  const int num_micro_batches = 2 * comm->size();
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches},
                as_factory(layers_of(width, torch::kFloat)));
  Batch batch = batch_of(64 * num_micro_batches, width, torch::kFloat);
  batch.inputs[0] = batch.inputs[0].to(comm->device());
  batch.targets[0] = batch.targets[0].to(comm->device());
  const auto peak = [&] {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(comm->device().index());
    c10::cuda::CUDACachingAllocator::resetPeakStats(comm->device().index());
    return stats.allocated_bytes[0].peak;
  };
  const auto steps = [&](int count) {
    for (int i = 0; i < count; ++i) {
      pipe->zero_grad();
      pipe->step(batch, squared_error());
    }
    return peak();
  };
  steps(10);
  const auto early = steps(10);
  EXPECT_LE(steps(80), early + (early / 50)) << "bytes at the peak of a step grow";
}

TEST(GpuRank, AnAbortInTheMiddleOfAStepLeavesParametersAndGradients) {
  const auto comm = connect("abort");
  const int width = 256;
  const int num_micro_batches = 2 * comm->size();
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches},
                as_factory(layers_of(width, torch::kFloat)));
  Batch batch = batch_of(16 * num_micro_batches, width, torch::kFloat);
  batch.inputs[0] = batch.inputs[0].to(comm->device());
  batch.targets[0] = batch.targets[0].to(comm->device());
  pipe->step(batch, squared_error());
  Tensors before;
  for (const at::Tensor& parameter : pipe->parameters()) before.push_back(parameter.grad().clone());
  const LossFn fails = [&](const Tensors& outputs, const Tensors& targets) -> at::Tensor {
    if (comm->rank() == 0) throw std::domain_error("the loss is not a number");
    return squared_error()(outputs, targets);
  };
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_THAT(message_of([&] { pipe->step(batch, fails); }), HasSubstr("the loss is not a number"));
  torch::cuda::synchronize();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 10s);
  std::size_t i = 0;
  for (const at::Tensor& parameter : pipe->parameters()) EXPECT_TRUE(torch::equal(parameter.grad(), before[i++]));
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
