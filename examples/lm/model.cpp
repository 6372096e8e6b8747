#include "model.hpp"

#include <type_traits>
#include <utility>

#include "dualpipe/stage/as_stage.hpp"

namespace lm {
namespace {

using example::ModelSize;

/// x + attention(norm(x)), then x + mlp(norm(x)).
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const ModelSize& size, at::Generator random) : torch::nn::Module("Block"), dropout_(size.dropout) {
    const std::int64_t width = size.width;
    attention_ = register_module("attention", example::Attention(size, random));
    mlp_norm_ = register_module("mlp_norm", example::norm(width));
    mlp_in_ = register_module("mlp_in", example::linear(width, 4 * width, 0.8, random));
    mlp_out_ = register_module("mlp_out", example::linear(4 * width, width, example::branch_gain(size), random));
  }

  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor y = x + attention_(x);
    return y + torch::dropout(mlp_out_(torch::gelu(mlp_in_(mlp_norm_(y)))), dropout_, is_training());
  }

 private:
  double dropout_;
  example::Attention attention_{nullptr};
  torch::nn::LayerNorm mlp_norm_{nullptr};
  torch::nn::Linear mlp_in_{nullptr}, mlp_out_{nullptr};
};
TORCH_MODULE(Block);

}  // namespace

std::vector<dualpipe::NamedLayer> layers_of(const ModelSize& size, std::uint64_t seed) {
  check(size);
  std::vector<dualpipe::NamedLayer> layers;
  const auto add = [&]<class Layer>(std::string name, std::type_identity<Layer>) {
    layers.push_back({std::move(name), [size, seed, place = layers.size()] {
                        return dualpipe::as_stage(Layer(size, example::generator_of(seed, place)));
                      }});
  };
  add("embedding", std::type_identity<example::Embedding>{});
  for (int i = 0; i < size.layers; ++i) add("block" + std::to_string(i), std::type_identity<Block>{});
  add("norm_head", std::type_identity<example::NormHead>{});
  return layers;
}

std::vector<double> layer_costs(const ModelSize& size) {
  const double width = size.width;
  std::vector<double> costs(static_cast<std::size_t>(size.layers) + 2, attention_cost(size) + 8 * width * width);
  costs.front() = embedding_cost(size);
  costs.back() = head_cost(size);
  return costs;
}

std::string description(const ModelSize& size) {
  const std::int64_t width = size.width;
  const std::int64_t parameters = embedding_parameters(size) +
                                  size.layers * (attention_parameters(size) + 8 * width * width + 7 * width) +
                                  head_parameters(size);
  return example::describe(size) + ", " + example::millions(parameters) + " parameters";
}

}  // namespace lm
