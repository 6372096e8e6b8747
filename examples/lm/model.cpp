#include "model.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "dualpipe/error.hpp"
#include "dualpipe/runtime/as_stage.hpp"

namespace lm {
namespace {

constexpr std::int64_t kBytes = 256;
constexpr std::int64_t kNearBytes = 4;

/// Normal weights of standard deviation gain / sqrt(fan_in), zero bias.
torch::nn::Linear linear(std::int64_t in, std::int64_t out, double gain, at::Generator& random) {
  torch::nn::Linear layer(in, out);
  torch::NoGradGuard no_grad;
  layer->weight.normal_(0, gain / std::sqrt(static_cast<double>(in)), random);
  layer->bias.zero_();
  return layer;
}

torch::nn::LayerNorm norm(std::int64_t width) { return torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})); }

/// The sum of what a byte and the few before it stand for, each by a table of its own. So the first block already sees
/// short words, which a run of minutes would otherwise spend on learning to look them up.
class EmbeddingImpl : public torch::nn::Module {
 public:
  EmbeddingImpl(const ModelSize& size, at::Generator random) : torch::nn::Module("Embedding") {
    for (std::int64_t i = 0; i < kNearBytes; ++i) {
      const auto table = register_module("bytes" + std::to_string(i), torch::nn::Embedding(kBytes, size.width));
      torch::NoGradGuard no_grad;
      table->weight.normal_(0, 4 / std::sqrt(static_cast<double>(size.width)), random);
      tables_.push_back(table);
    }
  }

  torch::Tensor forward(const torch::Tensor& text) {
    torch::Tensor sum = tables_[0](text);
    for (std::int64_t back = 1; back < std::min(kNearBytes, text.size(1)); ++back)
      sum = sum + torch::constant_pad_nd(tables_[back](text.narrow(1, 0, text.size(1) - back)), {0, 0, back, 0});
    return sum;
  }

 private:
  std::vector<torch::nn::Embedding> tables_;
};
TORCH_MODULE(Embedding);

/// What attention adds to its scores: minus infinity for later bytes, and less the farther away an earlier byte lies,
/// more steeply so in the first heads than in the last (Press, Smith and Lewis, "Train Short, Test Long", 2022). Tells
/// the model where bytes are without anything to learn, which shows in a run of minutes. [heads, context, context]
torch::Tensor attention_bias(const ModelSize& size) {
  const torch::Tensor place = torch::arange(size.context, torch::kFloat);
  const torch::Tensor distance = place.unsqueeze(1) - place;
  const torch::Tensor slopes = torch::exp2(-8 * torch::arange(1, size.heads + 1, torch::kFloat) / size.heads);
  return (-slopes.view({-1, 1, 1}) * distance).masked_fill(distance < 0, -std::numeric_limits<float>::infinity());
}

/// x + attention(norm(x)), then x + mlp(norm(x)).
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const ModelSize& size, at::Generator random)
      : torch::nn::Module("Block"), heads_(size.heads), bias_(attention_bias(size)) {
    const std::int64_t width = size.width;
    // The branches of all blocks add up on the way to the head; so scaled, the sum starts out as large as one of them.
    const double branch = 1 / std::sqrt(2.0 * size.layers);
    attention_norm_ = register_module("attention_norm", norm(width));
    query_key_value_ = register_module("query_key_value", linear(width, 3 * width, 0.8, random));
    attention_out_ = register_module("attention_out", linear(width, width, branch, random));
    mlp_norm_ = register_module("mlp_norm", norm(width));
    mlp_in_ = register_module("mlp_in", linear(width, 4 * width, 0.8, random));
    mlp_out_ = register_module("mlp_out", linear(4 * width, width, branch, random));
  }

  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor y = x + attention(attention_norm_(x));
    return y + mlp_out_(torch::gelu(mlp_in_(mlp_norm_(y))));
  }

 private:
  torch::Tensor attention(const torch::Tensor& x) {
    const auto batch = x.size(0), length = x.size(1);
    const auto parts = query_key_value_(x).view({batch, length, 3, heads_, -1}).permute({2, 0, 3, 1, 4}).unbind();
    const auto bias = bias_.to(x.device()).narrow(1, 0, length).narrow(2, 0, length);
    const auto mixed = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], bias);
    return attention_out_(mixed.transpose(1, 2).reshape({batch, length, -1}));
  }

  std::int64_t heads_;
  torch::Tensor bias_;  // no buffer: it never changes and needs neither saving nor sending
  torch::nn::LayerNorm attention_norm_{nullptr}, mlp_norm_{nullptr};
  torch::nn::Linear query_key_value_{nullptr}, attention_out_{nullptr}, mlp_in_{nullptr}, mlp_out_{nullptr};
};
TORCH_MODULE(Block);

class NormHeadImpl : public torch::nn::Module {
 public:
  NormHeadImpl(const ModelSize& size, at::Generator random) : torch::nn::Module("NormHead") {
    norm_ = register_module("norm", norm(size.width));
    head_ = register_module("head", linear(size.width, kBytes, 0.15, random));
  }
  torch::Tensor forward(const torch::Tensor& x) { return head_(norm_(x)); }

 private:
  torch::nn::LayerNorm norm_{nullptr};
  torch::nn::Linear head_{nullptr};
};
TORCH_MODULE(NormHead);

}  // namespace

void check(const ModelSize& size) {
  DUALPIPE_CHECK(size.layers >= 1 && size.width >= 1 && size.heads >= 1 && size.context >= 1,
                 "layers, width, heads and context must be at least 1, got ", size.layers, ", ", size.width, ", ",
                 size.heads, " and ", size.context);
  DUALPIPE_CHECK(size.width % size.heads == 0, "the width is shared evenly by the heads, got width ", size.width,
                 " and ", size.heads, " heads");
}

std::vector<dualpipe::NamedLayer> layers_of(const ModelSize& size, std::uint64_t seed) {
  check(size);
  std::vector<dualpipe::NamedLayer> layers;
  const auto add = [&]<class Layer>(std::string name, std::type_identity<Layer>) {
    const auto own_seed = seed * 100'003 + layers.size();
    layers.push_back({std::move(name), [size, own_seed] {
                        return dualpipe::as_stage(Layer(size, at::detail::createCPUGenerator(own_seed)));
                      }});
  };
  add("embedding", std::type_identity<Embedding>{});
  for (int i = 0; i < size.layers; ++i) add("block" + std::to_string(i), std::type_identity<Block>{});
  add("norm_head", std::type_identity<NormHead>{});
  return layers;
}

std::vector<double> layer_costs(const ModelSize& size) {
  const double width = size.width;
  std::vector<double> costs(static_cast<std::size_t>(size.layers) + 2, 12 * width * width + 2 * width * size.context);
  costs.front() = kNearBytes * width;
  costs.back() = width * kBytes;
  return costs;
}

std::int64_t parameter_count(const ModelSize& size) {
  const std::int64_t width = size.width;
  return kNearBytes * kBytes * width + size.layers * (12 * width * width + 13 * width) + 2 * width +
         (width + 1) * kBytes;
}

}  // namespace lm
