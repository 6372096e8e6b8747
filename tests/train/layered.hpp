#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/stage/partition.hpp"
#include "pipeline/pipeline.hpp"

// One model for the tests of checkpoints: layers "layers.0" to "layers.7", cut by a pipeline or as one module.
namespace dualpipe::test {

constexpr int kLayers = 8;

inline std::vector<NamedLayer> layered_layers() {
  std::vector<NamedLayer> layers;
  for (int number = 0; number < kLayers; ++number)
    layers.push_back({"layers." + std::to_string(number), [number] { return as_stage(Layer(number)); }});
  return layers;
}

struct WholeImpl : torch::nn::Module {
  WholeImpl() {
    auto level = std::make_shared<torch::nn::Module>("Layers");
    register_module("layers", level);
    for (int number = 0; number < kLayers; ++number) {
      layers.emplace_back(number);
      level->register_module(std::to_string(number), layers.back().ptr());
    }
  }
  torch::Tensor forward(torch::Tensor x) {
    for (Layer& layer : layers) x = layer->forward(x);
    return x;
  }
  std::vector<Layer> layers;
};
TORCH_MODULE(Whole);

inline DualPipe layered_pipe(const std::shared_ptr<Communicator>& comm, const std::string& kind) {
  const int stages = kind == "dualpipev" || kind == "zbv" ? 2 * comm->size() : comm->size();
  return DualPipe(comm, {.num_micro_batches = kMicroBatches, .schedule = kind}, split(layered_layers(), stages));
}

/// Every replica gets the same batches here, so all of them together do what one would.
inline DualPipe layered_pipe(const Mesh& mesh, const std::string& kind) {
  const int ranks = mesh.pipeline()->size();
  const int stages = kind == "dualpipev" || kind == "zbv" ? 2 * ranks : ranks;
  return DualPipe(mesh, {.num_micro_batches = kMicroBatches, .schedule = kind}, split(layered_layers(), stages));
}

inline Batch batch_of_step(int step) { return random_batch(2 * kMicroBatches, 100 * static_cast<std::uint64_t>(step)); }

/// The loss of one step, whose gradients the optimizer has used.
inline double train_step(DualPipe& pipe, torch::optim::Optimizer& optimizer, int step) {
  optimizer.zero_grad();
  const StepResult result = pipe->step(batch_of_step(step), squared_error());
  optimizer.step();
  return result.loss.item<double>();
}
inline double train_step(Whole& model, torch::optim::Optimizer& optimizer, int step) {
  optimizer.zero_grad();
  double sum = 0;
  for (const Batch& part : split_batch(batch_of_step(step), kMicroBatches, 0)) {
    const torch::Tensor loss = torch::mse_loss(model->forward(part.inputs[0]), part.targets[0]);
    sum += loss.item<double>();
    (loss / kMicroBatches).backward();
  }
  optimizer.step();
  return sum / kMicroBatches;
}
template <class Model>
std::vector<double> train(Model& model, torch::optim::Optimizer& optimizer, int first, int last) {
  std::vector<double> losses;
  for (int step = first; step <= last; ++step) losses.push_back(train_step(model, optimizer, step));
  return losses;
}

/// Forgets what the model was made with.
inline void scramble(torch::nn::Module& model) {
  torch::NoGradGuard no_grad;
  for (auto& parameter : model.parameters()) parameter.fill_(0.5);
}

inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         std::memcmp(a.contiguous().const_data_ptr(), b.contiguous().const_data_ptr(), a.nbytes()) == 0;
}

/// Copies of all parameters, by name.
inline std::map<std::string, at::Tensor> weights_of(const torch::nn::Module& model) {
  std::map<std::string, at::Tensor> weights;
  for (const auto& item : model.named_parameters()) weights[item.key()] = item.value().detach().clone();
  return weights;
}
inline void expect_same_weights(const torch::nn::Module& model, const std::map<std::string, at::Tensor>& expected) {
  const auto found = weights_of(model);
  ASSERT_EQ(found.size(), expected.size());
  for (const auto& [name, tensor] : expected) EXPECT_TRUE(same_bits(found.at(name), tensor)) << name;
}

}  // namespace dualpipe::test
