#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/stage/partition.hpp"
#include "dualpipe/stage/random.hpp"
#include "dualpipe/train/sharded_optimizer.hpp"
#include "pipeline/pipeline.hpp"

// A model that draws random numbers, in layers that each schedule cuts in another way, and one process that trains it.
namespace dualpipe::test {

constexpr int kNoisyLayers = 10;
constexpr std::uint64_t kNoisySeed = 20261128;
constexpr double kNoisyNorm = 0.05;  // gradients are clipped to it

inline std::string noisy_name(int layer) { return "layers." + std::to_string(layer); }

/// Begins with weights from LibTorch's default generator.
struct NoisyImpl : torch::nn::Module {
  NoisyImpl() : linear(register_module("linear", torch::nn::Linear(kWidth, kWidth))) { to(torch::kDouble); }
  /// With dropout. @param generator  undefined: LibTorch's own.
  torch::Tensor forward(const torch::Tensor& x, const at::Generator& generator) {
    const torch::Tensor kept = torch::empty_like(x, torch::MemoryFormat::Contiguous).bernoulli_(0.7, generator) / 0.7;
    return x + torch::tanh(linear(x * kept)) * torch::rand({}, generator, f64());
  }
  torch::nn::Linear linear;
};
TORCH_MODULE(Noisy);

/// @param of_context  draws from the generator of the context, else from LibTorch's own.
inline std::vector<NamedLayer> noisy_layers(bool of_context) {
  std::vector<NamedLayer> layers;
  for (int i = 0; i < kNoisyLayers; ++i)
    layers.push_back({noisy_name(i), [of_context] {
                        Noisy module;
                        return Stage(module).compute("draw", [=](const Tensors& x, const StageContext& c) mutable {
                          return module->forward(x[0], of_context ? c.generator : at::Generator());
                        });
                      }});
  return layers;
}

inline Batch noisy_batch(int num_micro_batches, int step, int replica = 0) {
  return random_batch(2 * num_micro_batches, 1000 + 100 * step + 10 * replica);
}

/// Each layer is made, and runs, with the seeds that the documentation names.
struct NoisyTruth {
  std::vector<std::vector<double>> losses;  // by step, of all micro-batches
  torch::OrderedDict<std::string, at::Tensor> start, weights;
};

inline NoisyTruth noisy_truth(std::uint64_t seed, int num_micro_batches, int num_replicas, int num_steps) {
  torch::nn::Module model;
  auto level = model.register_module("layers", std::make_shared<torch::nn::Module>());
  std::vector<Noisy> layers;
  for (int i = 0; i < kNoisyLayers; ++i) {
    const SeededDefaults scope(weights_seed(seed, noisy_name(i)));
    layers.push_back(level->register_module(std::to_string(i), Noisy()));
  }
  NoisyTruth truth;
  for (const auto& item : model.named_parameters()) truth.start.insert(item.key(), item.value().detach().clone());
  torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  for (int step = 0; step < num_steps; ++step) {
    optimizer.zero_grad();
    std::vector<double>& losses = truth.losses.emplace_back();
    for (int replica = 0; replica < num_replicas; ++replica)
      for (const Batch& part : split_batch(noisy_batch(num_micro_batches, step, replica), num_micro_batches, 0)) {
        const RandomKey key{.seed = seed, .step = step, .micro_batch = std::ssize(losses)};
        torch::Tensor x = part.inputs[0];
        for (int i = 0; i < kNoisyLayers; ++i) {
          const SeededDefaults scope(layer_seed(key, noisy_name(i)));
          x = layers[i]->forward(x, {});
        }
        const torch::Tensor loss = torch::mse_loss(x, part.targets[0]);
        losses.push_back(loss.item<double>());
        (loss / (num_micro_batches * num_replicas)).backward();
      }
    torch::nn::utils::clip_grad_norm_(model.parameters(), kNoisyNorm);
    optimizer.step();
  }
  for (const auto& item : model.named_parameters()) truth.weights.insert(item.key(), item.value().detach());
  return truth;
}

/// The weights of this rank's stages, without "stage<k>.".
inline torch::OrderedDict<std::string, at::Tensor> noisy_weights(DualPipe& pipe) {
  torch::OrderedDict<std::string, at::Tensor> weights;
  for (const auto& item : pipe->named_parameters())
    weights.insert(item.key().substr(item.key().find('.') + 1), item.value().detach().clone());
  return weights;
}

/// Expects that a pipeline of the options' seed, or of that of the process, is what one process is, and that all copies
/// have the same bits before each step.
inline void expect_noisy_truth(const Mesh& mesh, DualPipeOptions options, bool of_context, const NoisyTruth& truth) {
  options.compare_replicas_every = 1;
  const int num_stages =
      make_schedule({options.schedule, mesh.pipeline()->size(), options.num_micro_batches}).num_stages;
  DualPipe pipe(mesh, options, split(noisy_layers(of_context), num_stages));
  for (const auto& item : noisy_weights(pipe)) EXPECT_TRUE(torch::equal(item.value(), truth.start[item.key()]));
  ShardedOptimizer optimizer(
      pipe, std::make_unique<torch::optim::SGD>(pipe->owned_parameters(), torch::optim::SGDOptions(0.1).momentum(0.9)));
  for (std::size_t step = 0; step < truth.losses.size(); ++step) {
    optimizer.zero_grad();
    const Batch batch = noisy_batch(options.num_micro_batches, static_cast<int>(step), mesh.replica());
    const std::vector<double> losses = pipe->step(batch, squared_error()).micro_batch_losses();
    pipe->clip_grad_norm_(kNoisyNorm);
    optimizer.step();
    ASSERT_EQ(losses.size(), truth.losses[step].size());
    for (std::size_t m = 0; m < losses.size(); ++m)
      EXPECT_NEAR(losses[m], truth.losses[step][m], 1e-12) << "step " << step << ", micro-batch " << m;
  }
  for (const auto& item : noisy_weights(pipe))
    EXPECT_LE(difference(item.value(), truth.weights[item.key()]), 1e-10) << item.key();
}

}  // namespace dualpipe::test
