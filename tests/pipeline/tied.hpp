#pragma once

#include <torch/torch.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "pipeline/pipeline.hpp"

// A model whose embedding is its head too, and whose layers all read one table: in one piece, and as stages.
namespace dualpipe::test {

constexpr int kTokens = 11;

struct TiedModelImpl : torch::nn::Module {
  explicit TiedModelImpl(int num_layers) {
    wte = register_module(
        "wte", torch::nn::Embedding(
                   torch::nn::EmbeddingOptions(kTokens, kWidth)._weight(seeded({kTokens, kWidth}, 77) * 0.3)));
    auto blocks = std::make_shared<torch::nn::Module>("Blocks");
    register_module("blocks", blocks);
    for (int i = 0; i < num_layers; ++i) {
      layers.emplace_back(i);
      blocks->register_module(std::to_string(i), layers.back().ptr());
    }
    scale = register_parameter("scale", torch::full({kTokens}, 1.1, f64()));
    table = register_buffer("table", seeded({kWidth}, 78) * 0.1);
  }
  torch::Tensor embed(const torch::Tensor& tokens) { return wte->forward(tokens); }
  torch::Tensor layer(int number, const torch::Tensor& x) { return layers[number]->forward(x + table); }
  torch::Tensor head(const torch::Tensor& x) {
    return torch::dropout(x, 0.5, is_training() && drops).matmul(wte->weight.t()) * scale;
  }
  torch::Tensor forward(const torch::Tensor& tokens) {
    torch::Tensor x = embed(tokens);
    for (int i = 0; i < static_cast<int>(layers.size()); ++i) x = layer(i, x);
    return head(x);
  }
  torch::nn::Embedding wte = nullptr;
  std::vector<Layer> layers;
  torch::Tensor scale, table;
  bool drops = false;
};
TORCH_MODULE(TiedModel);

/// The whole model is the module of each stage. Layer i is stage i; the embedding is in the first, the head in the last.
inline StageFactory whole_model_as_stages(TiedModel model) {
  return [model](int number) {
    const int last = static_cast<int>(model->layers.size()) - 1;
    std::vector<std::string> parts{"table", "blocks." + std::to_string(number)};
    if (number == 0 || number == last) parts.emplace_back("wte");
    if (number == last) parts.emplace_back("scale");
    Stage stage =
        Stage(model).uses(parts).tie("table").compute("part", [model, number, last](const torch::Tensor& x) mutable {
          const torch::Tensor y = model->layer(number, number == 0 ? model->embed(x) : x);
          return number == last ? model->head(y) : y;
        });
    if (number == 0 || number == last) stage.tie("wte");
    return stage;
  };
}

/// Each stage has a module of its own, in which the weights have other names; what stages of a rank share is `model`'s.
inline StageFactory modules_as_stages(TiedModel model) {
  return [model](int number) {
    const int last = static_cast<int>(model->layers.size()) - 1;
    auto module = std::make_shared<torch::nn::Module>("Stage");
    module->register_module("layer", model->layers[number].ptr());
    module->register_buffer("table" + std::to_string(number), model->table);
    if (number == 0) module->register_module("embedding", model->wte.ptr());
    if (number == last) module->register_parameter("head", model->wte->weight);
    if (number == last) module->register_parameter("scale", model->scale);
    Stage stage(module);
    stage.tie("table" + std::to_string(number), "table");
    if (number == 0) stage.tie("embedding.weight", "tokens");
    if (number == last) stage.tie("head", "tokens");
    return stage.compute("part", [model, number, last](const torch::Tensor& x) mutable {
      const torch::Tensor y = model->layer(number, number == 0 ? model->embed(x) : x);
      return number == last ? model->head(y) : y;
    });
  };
}

/// From a name in a pipeline of either factory to that in the model.
inline std::string name_in_model(const std::string& name) {
  const auto dot = name.find('.');
  const std::string number = name.substr(5, dot - 5), rest = name.substr(dot + 1);
  if (rest.starts_with("layer.")) return "blocks." + number + rest.substr(5);
  if (rest == "embedding.weight" || rest == "head") return "wte.weight";
  return rest;
}

inline Batch token_batch(int rows, std::uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return {.inputs = {torch::randint(kTokens, {rows}, generator, torch::kLong)},
          .targets = {seeded({rows, kTokens}, seed + 1)}};
}

/// One step of one process: accumulates the gradients of the mean loss over all batches' micro-batches.
inline void tied_step(TiedModel& model, const std::vector<Batch>& batches, int num_micro_batches) {
  for (const Batch& batch : batches)
    for (const Batch& part : split_batch(batch, num_micro_batches, 0)) {
      const torch::Tensor loss = torch::mse_loss(model->forward(part.inputs[0]), part.targets[0]);
      (loss / (num_micro_batches * static_cast<int>(batches.size()))).backward();
    }
}

}  // namespace dualpipe::test
