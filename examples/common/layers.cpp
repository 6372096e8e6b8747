#include "layers.hpp"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>
#include <sstream>

#include "dualpipe/error.hpp"

namespace example {
namespace {

constexpr std::int64_t kNearBytes = 4;

/// What attention adds to its scores: minus infinity for later bytes, and less the farther away an earlier byte lies,
/// more steeply so in the first heads than in the last (Press, Smith and Lewis, "Train Short, Test Long", 2022). Tells
/// the model where bytes are without anything to learn, which shows in a run of minutes. [heads, context, context]
torch::Tensor attention_bias(const ModelSize& size) {
  const torch::Tensor place = torch::arange(size.context, torch::kFloat);
  const torch::Tensor distance = place.unsqueeze(1) - place;
  const torch::Tensor slopes = torch::exp2(-8 * torch::arange(1, size.heads + 1, torch::kFloat) / size.heads);
  return (-slopes.view({-1, 1, 1}) * distance).masked_fill(distance < 0, -std::numeric_limits<float>::infinity());
}

}  // namespace

void check(const ModelSize& size) {
  DUALPIPE_CHECK(size.layers >= 1 && size.width >= 1 && size.heads >= 1 && size.context >= 1,
                 "layers, width, heads and context must be at least 1, got ", size.layers, ", ", size.width, ", ",
                 size.heads, " and ", size.context);
  DUALPIPE_CHECK(size.width % size.heads == 0, "the width is shared evenly by the heads, got width ", size.width,
                 " and ", size.heads, " heads");
}

torch::nn::Linear linear(std::int64_t in, std::int64_t out, double gain, at::Generator& random) {
  torch::nn::Linear layer(in, out);
  torch::NoGradGuard no_grad;
  layer->weight.normal_(0, gain / std::sqrt(static_cast<double>(in)), random);
  layer->bias.zero_();
  return layer;
}

torch::nn::LayerNorm norm(std::int64_t width) { return torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})); }

double branch_gain(const ModelSize& size) { return 1 / std::sqrt(2.0 * size.layers); }

EmbeddingImpl::EmbeddingImpl(const ModelSize& size, at::Generator random)
    : torch::nn::Module("Embedding"), dropout_(size.dropout) {
  for (std::int64_t i = 0; i < kNearBytes; ++i) {
    const auto table = register_module("bytes" + std::to_string(i), torch::nn::Embedding(kBytes, size.width));
    torch::NoGradGuard no_grad;
    table->weight.normal_(0, 4 / std::sqrt(static_cast<double>(size.width)), random);
    tables_.push_back(table);
  }
}

torch::Tensor EmbeddingImpl::forward(const torch::Tensor& text) {
  torch::Tensor sum = tables_[0](text);
  for (std::int64_t back = 1; back < std::min(kNearBytes, text.size(1)); ++back)
    sum = sum + torch::constant_pad_nd(tables_[back](text.narrow(1, 0, text.size(1) - back)), {0, 0, back, 0});
  return torch::dropout(sum, dropout_, is_training());
}

AttentionImpl::AttentionImpl(const ModelSize& size, at::Generator& random)
    : torch::nn::Module("Attention"), heads_(size.heads), dropout_(size.dropout), bias_(attention_bias(size)) {
  norm_ = register_module("norm", norm(size.width));
  query_key_value_ = register_module("query_key_value", linear(size.width, 3 * size.width, 0.8, random));
  out_ = register_module("out", linear(size.width, size.width, branch_gain(size), random));
}

torch::Tensor AttentionImpl::forward(const torch::Tensor& x) {
  const auto batch = x.size(0), length = x.size(1);
  const auto parts = query_key_value_(norm_(x)).view({batch, length, 3, heads_, -1}).permute({2, 0, 3, 1, 4}).unbind();
  bias_ = bias_.to(x.options());
  const auto bias = bias_.narrow(1, 0, length).narrow(2, 0, length);
  const auto mixed = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], bias);
  return torch::dropout(out_(mixed.transpose(1, 2).reshape({batch, length, -1})), dropout_, is_training());
}

NormHeadImpl::NormHeadImpl(const ModelSize& size, at::Generator random) : torch::nn::Module("NormHead") {
  norm_ = register_module("norm", norm(size.width));
  head_ = register_module("head", linear(size.width, kBytes, 0.15, random));
}

torch::Tensor NormHeadImpl::forward(const torch::Tensor& x) { return head_(norm_(x)); }

at::Generator generator_of(std::uint64_t seed, std::size_t layer) {
  return at::detail::createCPUGenerator(seed * 100'003 + layer);
}

double embedding_cost(const ModelSize& size) { return kNearBytes * size.width; }
double attention_cost(const ModelSize& size) {
  const double width = size.width;
  return 4 * width * width + 2 * width * size.context;
}
double head_cost(const ModelSize& size) { return static_cast<double>(size.width) * kBytes; }

std::int64_t embedding_parameters(const ModelSize& size) { return kNearBytes * kBytes * size.width; }
std::int64_t attention_parameters(const ModelSize& size) {
  const std::int64_t width = size.width;
  return 4 * width * width + 6 * width;
}
std::int64_t head_parameters(const ModelSize& size) { return 2 * size.width + (size.width + 1) * kBytes; }

std::string describe(const ModelSize& size) {
  return dualpipe::detail::str(size.layers, " blocks, width ", size.width, ", ", size.heads, " heads, context ",
                               size.context);
}

std::string millions(std::int64_t count) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(2) << 1e-6 * static_cast<double>(count) << " million";
  return text.str();
}

}  // namespace example
