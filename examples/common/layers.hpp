#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

#include "dualpipe/stage/partition.hpp"
#include "model_size.hpp"

// What byte-level transformers have in common, whatever follows the attention in their blocks.
namespace example {

constexpr std::int64_t kBytes = 256;

/// Normal weights of standard deviation gain / sqrt(fan_in), zero bias.
torch::nn::Linear linear(std::int64_t in, std::int64_t out, double gain, at::Generator& random);
torch::nn::LayerNorm norm(std::int64_t width);
/// The branches of all blocks add up on the way to the head; with this gain the sum starts out as large as one of them.
double branch_gain(const ModelSize& size);

/// The sum of what a byte and the few before it stand for, each by a table of its own. So the first block already sees
/// short words, which a run of minutes would otherwise spend on learning to look them up.
class EmbeddingImpl : public torch::nn::Module {
 public:
  EmbeddingImpl(const ModelSize& size, at::Generator random);
  torch::Tensor forward(const torch::Tensor& text);  ///< int64 [batch, length] to [batch, length, width]

 private:
  double dropout_;
  std::vector<torch::nn::Embedding> tables_;
};
TORCH_MODULE(Embedding);

/// Causal self-attention over [batch, length, width].
class AttentionImpl : public torch::nn::Module {
 public:
  AttentionImpl(const ModelSize& size, at::Generator& random);
  torch::Tensor forward(const torch::Tensor& x);  ///< attention(norm(x))

 private:
  std::int64_t heads_;
  double dropout_;
  torch::Tensor bias_;  // no buffer, as it never changes: neither saved nor sent, it follows what comes
  torch::nn::LayerNorm norm_{nullptr};
  torch::nn::Linear query_key_value_{nullptr}, out_{nullptr};
};
TORCH_MODULE(Attention);

class NormHeadImpl : public torch::nn::Module {
 public:
  NormHeadImpl(const ModelSize& size, at::Generator random);
  torch::Tensor forward(const torch::Tensor& x);  ///< [batch, length, width] to logits [batch, length, 256]

 private:
  torch::nn::LayerNorm norm_{nullptr};
  torch::nn::Linear head_{nullptr};
};
TORCH_MODULE(NormHead);

/// Of a layer's first weights: follows from `seed` and the layer's place alone, so that the model is the same however
/// its layers are cut into stages.
at::Generator generator_of(std::uint64_t seed, std::size_t layer);

/// Multiply-adds per byte, as costs for dualpipe::split.
double embedding_cost(const ModelSize& size);
double attention_cost(const ModelSize& size);
double head_cost(const ModelSize& size);

std::int64_t embedding_parameters(const ModelSize& size);
std::int64_t attention_parameters(const ModelSize& size);
std::int64_t head_parameters(const ModelSize& size);

/// "14 blocks, width 64, 4 heads, context 64"
std::string describe(const ModelSize& size);
/// "0.78 million"
std::string millions(std::int64_t count);

}  // namespace example
