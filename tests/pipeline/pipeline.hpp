#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/local.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"

// What the pipeline tests compare with: the same model in one piece, one thread and ordinary autograd.
namespace dualpipe::test {

constexpr int kWidth = 6;
// Of tests that say nothing else.
constexpr int kRanks = 4;
constexpr int kMicroBatches = 8;

inline at::TensorOptions f64() { return torch::dtype(torch::kDouble); }

/// One stage of a model as plain code: what a stage runs in a pipeline, and the reference runs one after the other.
struct Piece {
  std::shared_ptr<torch::nn::Module> module;
  std::function<Tensors(const Tensors&)> forward;
};
using Model = std::function<Piece(int stage)>;

inline StageFactory as_factory(const Model& model) {
  return [model](int number) {
    const Piece piece = model(number);
    Stage stage(piece.module);
    stage.compute("piece", [piece](const Tensors& inputs, const StageContext&) { return piece.forward(inputs); });
    return stage;
  };
}

inline torch::Tensor seeded(std::vector<std::int64_t> sizes, std::uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return torch::randn(sizes, generator, f64());
}

struct LayerImpl : torch::nn::Module {
  explicit LayerImpl(int number) {
    weight = register_parameter("weight", seeded({kWidth, kWidth}, 1000 + number) * 0.4);
    bias = register_parameter("bias", seeded({kWidth}, 2000 + number) * 0.1);
  }
  torch::Tensor forward(const torch::Tensor& x) { return x + torch::tanh(torch::addmm(bias, x, weight)); }
  torch::Tensor weight, bias;
};
TORCH_MODULE(Layer);

/// Residual layers; weights depend on the stage's number only, so every layout builds the same model.
inline Piece layer(int stage) {
  Layer module(stage);
  return {module.ptr(), [module](const Tensors& x) mutable { return Tensors{module->forward(x[0])}; }};
}

inline LossFn squared_error() {
  return [](const Tensors& outputs, const Tensors& targets) { return torch::mse_loss(outputs[0], targets[0]); };
}

inline Batch random_batch(int rows, std::uint64_t seed) {
  Batch batch;
  batch.inputs = {seeded({rows, kWidth}, seed)};
  batch.targets = {seeded({rows, kWidth}, seed + 1)};
  return batch;
}

/// What one process finds in one step.
struct Reference {
  std::vector<double> losses;                                  // by micro-batch
  std::vector<Tensors> outputs;                                // by micro-batch
  std::map<int, std::map<std::string, at::Tensor>> gradients;  // by stage and name
};

inline Reference reference(const Model& model, int num_stages, const Batch& batch, int num_micro_batches,
                           const LossFn& loss, double scale) {
  Reference result;
  std::vector<Piece> pieces;
  for (int s = 0; s < num_stages; ++s) pieces.push_back(model(s));
  for (const Batch& micro_batch : split_batch(batch, num_micro_batches, 0)) {
    Tensors tensors;
    for (const auto& input : micro_batch.inputs) tensors.push_back(input.clone());
    for (Piece& piece : pieces) tensors = piece.forward(tensors);
    Tensors outputs;
    for (const auto& tensor : tensors) outputs.push_back(tensor.defined() ? tensor.detach().clone() : tensor);
    result.outputs.push_back(std::move(outputs));
    const auto value = loss(tensors, micro_batch.targets);
    result.losses.push_back(value.item<double>());
    if (value.requires_grad()) (value * scale).backward();
  }
  for (int s = 0; s < num_stages; ++s)
    if (pieces[s].module)
      for (const auto& item : pieces[s].module->named_parameters())
        result.gradients[s][item.key()] = item.value().grad().defined() ? item.value().grad().clone() : at::Tensor();
  return result;
}

/// Largest difference relative to the largest value; undefined equals undefined only.
inline double difference(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined() ? 0 : 1e300;
  if (!a.sizes().equals(b.sizes())) return 1e300;
  if (a.numel() == 0) return 0;
  return (a - b).abs().max().item<double>() / std::max(1e-300, b.abs().max().item<double>());
}

inline void expect_micro_batch_losses(const StepResult& result, const Reference& expected, double tolerance = 1e-12) {
  const std::vector<double> losses = result.micro_batch_losses();
  ASSERT_EQ(losses.size(), expected.losses.size());
  for (std::size_t m = 0; m < losses.size(); ++m)
    EXPECT_NEAR(losses[m], expected.losses[m], tolerance) << "micro-batch " << m;
}

/// Expects the gradients of this rank's stages to be those of the reference, times `factor`.
inline void expect_gradients(DualPipe& pipe, const Reference& expected, double tolerance = 1e-12, double factor = 1) {
  for (const auto& child : pipe->named_children()) {
    const int stage = std::stoi(child.key().substr(5));
    for (const auto& item : child.value()->named_parameters()) {
      at::Tensor truth = expected.gradients.at(stage).at(item.key());
      if (truth.defined()) truth = truth * factor;
      EXPECT_LE(difference(item.value().grad(), truth), tolerance) << child.key() << "." << item.key();
    }
  }
}

/// Message of what `body` throws, with its nested causes; "" if it does not.
inline std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

/// The one text with which `body` fails on every rank; "" if it does not fail.
inline std::string failure_on_all(int num_ranks, const std::function<void(std::shared_ptr<Communicator>)>& body) {
  std::mutex mutex;
  std::set<std::string> messages;
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
    const std::string message = message_of([&] { body(comm); });
    const std::lock_guard lock(mutex);
    messages.insert(message);
  });
  EXPECT_EQ(messages.size(), 1u) << ::testing::PrintToString(messages);
  return *messages.begin();
}

}  // namespace dualpipe::test
