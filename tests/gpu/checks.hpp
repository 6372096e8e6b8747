#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <gmock/gmock.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pipeline/pipeline.hpp"

// What ranks on GPUs must do, whether they are processes with NCCL between them or threads that share a device.
namespace dualpipe::test {

using Ptr = std::shared_ptr<Communicator>;

/// Residual layers of any width and dtype; weights depend on the stage's number only.
inline Model layers_of(int width, at::ScalarType dtype, int linears_per_stage = 1) {
  return [=](int stage) {
    auto generator = at::detail::createCPUGenerator(1000 + static_cast<std::uint64_t>(stage));
    torch::nn::Sequential layers;
    const torch::NoGradGuard no_grad;
    for (int i = 0; i < linears_per_stage; ++i) {
      torch::nn::Linear linear(width, width);
      linear->weight.copy_(torch::randn({width, width}, generator) * (0.5 / std::sqrt(width)));
      linear->bias.zero_();
      layers->push_back(linear);
    }
    layers->to(dtype);
    return Piece{layers.ptr(),
                 [layers](const Tensors& x) mutable { return Tensors{x[0] + torch::tanh(layers->forward(x[0]))}; }};
  };
}

inline Batch batch_of(int rows, int width, at::ScalarType dtype, at::Device device = at::kCPU) {
  auto generator = at::detail::createCPUGenerator(7);
  Batch batch;
  batch.inputs = {torch::randn({rows, width}, generator).to(device, dtype)};
  batch.targets = {torch::randn({rows, width}, generator).to(device, dtype)};
  return batch;
}

/// Compares two steps with one process on the CPU, in the same dtype.
inline void trains_as_one_process(const Ptr& comm, at::ScalarType dtype, double tolerance) {
  const int width = 64;
  const int num_micro_batches = 2 * comm->size();
  const int rows = 4 * num_micro_batches;
  const Model model = layers_of(width, dtype);
  const Reference expected = reference(model, comm->size(), batch_of(rows, width, dtype), num_micro_batches,
                                       squared_error(), 1.0 / num_micro_batches);
  const Batch batch = batch_of(rows, width, dtype, comm->device());
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches}, as_factory(model));
  for (int step = 1; step <= 2; ++step) {
    const std::vector<double> losses = pipe->step(batch, squared_error()).micro_batch_losses();
    ASSERT_EQ(losses.size(), expected.losses.size());
    for (std::size_t m = 0; m < losses.size(); ++m)
      EXPECT_NEAR(losses[m], expected.losses[m], tolerance * std::abs(expected.losses[m]));
    for (const auto& child : pipe->named_children())
      for (const auto& item : child.value()->named_parameters()) {
        const at::Tensor& truth = expected.gradients.at(std::stoi(child.key().substr(5))).at(item.key());
        EXPECT_LE(difference(item.value().grad().cpu(), truth * step), tolerance) << child.key() << "." << item.key();
      }
  }
}

inline void collectives_match_the_closed_form(const Ptr& comm) {
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

/// Something that keeps the current stream busy for a while and gives zero.
inline at::Tensor busy(at::Device device, int products = 3) {
  const auto ones = torch::ones({2048, 2048}, device);
  at::Tensor product = ones;
  for (int i = 0; i < products; ++i) product = product.mm(ones) * (1.0 / 2048);
  return product[0][0] - 1;
}

/// In the global order; far above the sizes that NCCL buffers.
inline void tensors_of_64_mib_cross_both_ways(const Ptr& comm) {
  const std::int64_t elements = 16 << 20;
  comm->connect({{0, 1}, {1, 0}});
  if (comm->rank() > 1) return comm->barrier().wait();
  std::vector<Pending> sends;
  for (int k = 0; k < 8; ++k) {
    const int from = k % 2;
    if (comm->rank() == from) {
      // Still being computed when send() is called.
      sends.push_back(comm->send(
          1 - from, {torch::full({elements}, 1.0F * k, torch::device(comm->device())) + busy(comm->device())}));
    } else {
      const at::Tensor got = comm->receive(from).take().at(0);
      EXPECT_EQ(got.numel(), elements);
      EXPECT_TRUE((got == k).all().item<bool>()) << "transfer " << k;
    }
  }
  for (Pending& send : sends) send.wait();
  comm->barrier().wait();
}

/// @param shared  the allocator counts what other ranks do as well, at moments that are not the same in every step.
inline void memory_is_flat_over_100_steps(const Ptr& comm, bool shared) {
  const int width = 512;
  const int num_micro_batches = 2 * comm->size();
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches},
                as_factory(layers_of(width, torch::kFloat)));
  const Batch batch = batch_of(64 * num_micro_batches, width, torch::kFloat, comm->device());
  struct Bytes {
    std::int64_t held, peak;
  };
  const auto steps = [&](int count) {
    for (int i = 0; i < count; ++i) {
      pipe->zero_grad();
      pipe->step(batch, squared_error());
    }
    comm->barrier().wait();
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(comm->device().index()).allocated_bytes[0];
    comm->barrier().wait();
    c10::cuda::CUDACachingAllocator::resetPeakStats(comm->device().index());
    comm->barrier().wait();
    return Bytes{stats.current, stats.peak};
  };
  steps(10);
  const Bytes early = steps(10), late = steps(80);
  EXPECT_LE(late.held, early.held) << "bytes that are still held after a step grow";
  EXPECT_LE(late.peak, early.peak + early.peak / (shared ? 4 : 50)) << "bytes at the peak of a step grow";
}

inline void an_abort_leaves_parameters_and_gradients(const Ptr& comm) {
  const int width = 256;
  const int num_micro_batches = 2 * comm->size();
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches},
                as_factory(layers_of(width, torch::kFloat)));
  const Batch batch = batch_of(16 * num_micro_batches, width, torch::kFloat, comm->device());
  pipe->step(batch, squared_error());
  Tensors before;
  for (const at::Tensor& parameter : pipe->parameters())
    before.insert(before.end(), {parameter.detach().clone(), parameter.grad().clone()});
  const LossFn fails = [&](const Tensors& outputs, const Tensors& targets) -> at::Tensor {
    if (comm->rank() == 0) throw std::domain_error("the loss is not a number");
    return squared_error()(outputs, targets);
  };
  EXPECT_THAT(message_of([&] { pipe->step(batch, fails); }), ::testing::HasSubstr("the loss is not a number"));
  torch::cuda::synchronize(comm->device().index());
  std::size_t i = 0;
  for (const at::Tensor& parameter : pipe->parameters()) {
    EXPECT_TRUE(torch::equal(parameter, before[i++]));
    EXPECT_TRUE(torch::equal(parameter.grad(), before[i++]));
  }
}

}  // namespace dualpipe::test
