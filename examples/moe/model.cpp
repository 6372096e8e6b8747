#include "model.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/OpMathType.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "combine.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/pipeline/group_collectives.hpp"
#include "dualpipe/stage/as_stage.hpp"

namespace moe {
namespace {

using dualpipe::Communicator;
using dualpipe::Stage;
using dualpipe::StageContext;
using dualpipe::Tensors;

constexpr const char* kTokens = "router_tokens";
constexpr const char* kBiasSteps = "router_bias_steps";

/// Some experts of a block, each an MLP of its own.
class ExpertsImpl : public torch::nn::Module {
 public:
  ExpertsImpl(const ModelSize& size, std::int64_t first, std::int64_t count, std::uint64_t seed)
      : torch::nn::Module("Experts") {
    const auto& transformer = size.transformer;
    for (std::int64_t e = first; e < first + count; ++e) {
      auto random = at::detail::createCPUGenerator(seed + static_cast<std::uint64_t>(e));
      const auto name = std::to_string(e);
      const double gain = example::branch_gain(transformer);
      in_.push_back(register_module(name + "_in", example::linear(transformer.width, size.expert_width, 0.8, random)));
      out_.push_back(
          register_module(name + "_out", example::linear(size.expert_width, transformer.width, gain, random)));
    }
  }

  /// @param weights  [rows, 1], what each row's result is multiplied by
  /// @param counts   [ranks, experts], int64, on the CPU: rows come from each rank for each expert, in this order
  torch::Tensor forward(const torch::Tensor& rows, const torch::Tensor& weights, const torch::Tensor& counts) {
    const at::IntArrayRef sizes(counts.const_data_ptr<std::int64_t>(), counts.numel());
    const Tensors parts = rows.split_with_sizes(sizes);
    Tensors results(parts.size());
    for (std::size_t e = 0; e < in_.size(); ++e) {
      Tensors own;
      std::vector<std::int64_t> own_sizes;
      for (std::size_t i = e; i < parts.size(); i += in_.size()) {
        own.push_back(parts[i]);
        own_sizes.push_back(sizes[i]);
      }
      const Tensors own_results = out_[e](torch::gelu(in_[e](torch::cat(own)))).split_with_sizes(own_sizes);
      for (std::size_t r = 0; r < own_results.size(); ++r) results[r * in_.size() + e] = own_results[r];
    }
    return torch::cat(results) * weights;
  }

 private:
  std::vector<torch::nn::Linear> in_, out_;
};
TORCH_MODULE(Experts);

/// What a block holds on one rank.
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const ModelSize& size, const Communicator& sharing, at::Generator random, std::uint64_t expert_seed)
      : torch::nn::Module("Block"),
        experts_(size.experts),
        top_k_(size.top_k),
        ranks_(sharing.size()),
        bias_rate_(size.bias_rate) {
    const std::int64_t width = size.transformer.width;
    attention_ = register_module("attention", example::Attention(size.transformer, random));
    norm_ = register_module("mlp_norm", example::norm(width));
    router_ = register_module("router", example::linear(width, experts_, 1, random));
    tokens_ = register_buffer(kTokens, torch::zeros({experts_}, torch::kInt64));
    bias_steps_ = register_buffer(kBiasSteps, torch::zeros({experts_}, torch::kInt64));
    const std::int64_t own = experts_ / ranks_;
    mlp_ = register_module("experts", Experts(size, sharing.rank() * own, own, expert_seed));
  }

  /// The node in front of the dispatch.
  Tensors attend(Tensors t) {
    t.resize(num_slots);
    // Shares that differ little add up to a loss close to zero: bfloat16 would not tell them apart.
    const at::ScalarType precise = at::toOpMathType(t[x].scalar_type());
    if (!t[balance].defined()) t[balance] = torch::zeros({1}, t[x].options().dtype(precise));
    t[x] = t[x] + attention_(t[x]);
    const auto bytes = norm_(t[x]).flatten(0, 1);

    const auto probabilities = torch::softmax(router_(bytes), 1, precise);
    const auto chosen = std::get<1>((probabilities.detach() + bias_rate_ * bias_steps_).topk(top_k_, 1));
    const auto likeliest = probabilities.gather(1, chosen);
    const auto shares = (likeliest / likeliest.sum(1, true)).flatten();
    const auto numbers = chosen.flatten();
    const auto order = torch::argsort(numbers, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    t[token] = order.div(top_k_, "floor");
    t[rows] = bytes.index_select(0, t[token]);
    t[weight] = shares.index_select(0, order).unsqueeze(1).to(bytes.scalar_type());
    // bincount would wait for the device.
    const auto load = torch::zeros({experts_}, numbers.options()).scatter_add(0, numbers, torch::ones_like(numbers));
    t[splits] = load.view({1, ranks_, -1});
    if (is_training()) tokens_.add_(load);

    const auto share = load.to(probabilities.scalar_type()) / numbers.numel();
    t[balance] = t[balance] + (experts_ * share.dot(probabilities.mean(0)) - 1);
    return t;
  }

  /// The node between dispatch and combine.
  Tensors run_experts(Tensors t) {
    t[rows] = mlp_(t[rows], t[weight], t[splits][0]);
    t[weight] = torch::Tensor();
    return t;
  }

 private:
  std::int64_t experts_, top_k_, ranks_;
  double bias_rate_;
  torch::Tensor tokens_;      // that went to each expert since adjust_biases(), on all ranks after a step
  torch::Tensor bias_steps_;  // by how many steps of bias_rate the bias of each expert was raised
  example::Attention attention_{nullptr};
  torch::nn::LayerNorm norm_{nullptr};
  torch::nn::Linear router_{nullptr};
  Experts mlp_{nullptr};
};
TORCH_MODULE(Block);

Stage block_of(const ModelSize& size, const std::shared_ptr<Communicator>& sharing, std::uint64_t seed,
               std::size_t place) {
  Block block(size, *sharing, example::generator_of(seed, place), 1'000 * (seed * 100'003 + place));
  Stage stage(block.ptr());
  stage
      .compute("attention",
               [block](const Tensors& inputs, const StageContext&) mutable { return block->attend(inputs); })
      .communicate("dispatch", dualpipe::all_to_all(sharing), {rows, weight, splits})
      .compute("MLP",
               [block](const Tensors& inputs, const StageContext&) mutable { return block->run_experts(inputs); })
      .communicate("combine", combine(sharing), {x, rows, token, splits});
  return stage;
}

Stage head_of(const ModelSize& size, std::uint64_t seed, std::size_t place) {
  example::NormHead head(size.transformer, example::generator_of(seed, place));
  Stage stage(head.ptr());
  stage.compute("norm_head", [head](const Tensors& inputs, const StageContext&) mutable {
    return Tensors{head->forward(inputs[x]), inputs[balance]};
  });
  return stage;
}

}  // namespace

void check(const ModelSize& size, int num_sharing) {
  check(size.transformer);
  DUALPIPE_CHECK(size.experts >= 1 && size.expert_width >= 1, "a block needs experts and each of them a width, got ",
                 size.experts, " and ", size.expert_width);
  DUALPIPE_CHECK(size.top_k >= 1 && size.top_k <= size.experts, "each byte goes to 1 to ", size.experts,
                 " experts, as many as there are, got --top-k ", size.top_k);
  DUALPIPE_CHECK(size.experts % num_sharing == 0, size.experts, " experts do not divide evenly among ", num_sharing,
                 " pipelines; give a multiple of that, or another --expert-parallel");
}

std::vector<dualpipe::NamedLayer> layers_of(const ModelSize& size, std::uint64_t seed,
                                            const std::shared_ptr<Communicator>& sharing) {
  check(size, sharing->size());
  std::vector<dualpipe::NamedLayer> layers;
  layers.push_back({"embedding", [size, seed] {
                      return dualpipe::as_stage(example::Embedding(size.transformer, example::generator_of(seed, 0)));
                    }});
  for (int i = 0; i < size.transformer.layers; ++i)
    layers.push_back({"block" + std::to_string(i),
                      [size, seed, sharing, place = layers.size()] { return block_of(size, sharing, seed, place); }});
  layers.push_back({"norm_head", [size, seed, place = layers.size()] { return head_of(size, seed, place); }});
  return layers;
}

std::vector<double> layer_costs(const ModelSize& size) {
  const double width = size.transformer.width;
  const double block =
      attention_cost(size.transformer) + width * size.experts + 2 * width * size.expert_width * size.top_k;
  std::vector<double> costs(static_cast<std::size_t>(size.transformer.layers) + 2, block);
  costs.front() = embedding_cost(size.transformer);
  costs.back() = head_cost(size.transformer);
  return costs;
}

bool is_expert(const std::string& parameter) { return parameter.find(".experts.") != std::string::npos; }

std::map<std::string, dualpipe::BufferReduction> buffers() { return {{kTokens, dualpipe::BufferReduction::sum}}; }

example::Routings adjust_biases(const torch::nn::Module& model) {
  const torch::NoGradGuard no_grad;
  const auto all = model.named_buffers();
  const auto numbers_of = [](const torch::Tensor& tensor) {
    const torch::Tensor host = tensor.to(torch::kCPU, torch::kInt64);
    return std::vector<std::int64_t>(host.const_data_ptr<std::int64_t>(),
                                     host.const_data_ptr<std::int64_t>() + host.numel());
  };
  example::Routings routings;
  for (const auto& item : all) {
    if (!item.key().ends_with(kTokens)) continue;
    torch::Tensor tokens = item.value();
    const torch::Tensor sum = tokens.sum();
    const std::string block = item.key().substr(0, item.key().size() - std::string(kTokens).size());
    torch::Tensor steps = all[block + kBiasSteps];
    steps.add_(torch::sign(sum - tokens.numel() * tokens));
    const std::size_t begin = block.rfind("block");  // behind the name of its stage
    routings[block.substr(begin, block.size() - begin - 1)] = {numbers_of(tokens), numbers_of(steps)};
    tokens.zero_();
  }
  return routings;
}

std::string description(const ModelSize& size) {
  const std::int64_t width = size.transformer.width;
  const std::int64_t expert = 2 * width * size.expert_width + size.expert_width + width;
  const std::int64_t others =
      embedding_parameters(size.transformer) + head_parameters(size.transformer) +
      size.transformer.layers * (attention_parameters(size.transformer) + 2 * width + (width + 1) * size.experts);
  const auto with = [&](std::int64_t experts) {
    return example::millions(others + size.transformer.layers * experts * expert);
  };
  return dualpipe::detail::str(describe(size.transformer), ", ", size.experts, " experts of width ", size.expert_width,
                               " in each block, ", with(size.experts), " parameters, of which ", with(size.top_k),
                               " see any one byte");
}

}  // namespace moe
