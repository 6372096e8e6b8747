// The mixture-of-experts example: its gradients are those of a plain model in one process in which every expert sees
// every byte, and the program trains the same model however ranks form pipelines.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <numeric>
#include <regex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/local.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/stage/stage_run.hpp"
#include "dualpipe/testing/communicators.hpp"
#include "dualpipe/train/mesh.hpp"
#include "examples/counting_device.hpp"
#include "examples/example_program.hpp"
#include "model.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr double kBalance = 0.1;
constexpr std::uint64_t kSeed = 7;

moe::ModelSize small(int layers) {
  moe::ModelSize size;
  size.transformer = {.layers = layers, .width = 12, .heads = 2, .context = 10};
  size.experts = 4;
  size.top_k = 2;
  size.expert_width = 9;
  size.bias_rate = 0.02;
  return size;
}

std::vector<NamedLayer> layers_of(const moe::ModelSize& size, const std::shared_ptr<Communicator>& sharing) {
  std::vector<NamedLayer> layers = moe::layers_of(size, kSeed, sharing);
  for (NamedLayer& layer : layers)
    layer.make = [make = layer.make] {
      Stage stage = make();
      stage.module()->to(torch::kDouble);
      return stage;
    };
  return layers;
}

torch::Tensor cross_entropy(const torch::Tensor& logits, const torch::Tensor& targets) {
  return torch::nn::functional::cross_entropy(logits.flatten(0, 1), targets.flatten());
}

torch::Tensor loss_of(const Tensors& outputs, const Tensors& targets) {
  return cross_entropy(outputs[0], targets[0]) + kBalance * outputs[1].sum();
}

/// The model again, written out: no stages, no dispatch, no sorting.
class Plain {
 public:
  explicit Plain(const moe::ModelSize& size) : size_(size) {
    for (const NamedLayer& layer : layers_of(size, local_communicators(1)[0]))
      for (const auto& item : layer.make().module()->named_parameters())
        parameters[layer.name + "." + item.key()] = item.value();
    for (int i = 0; i < size_.transformer.layers; ++i)
      for (auto* buffers : {&tokens, &bias_steps})
        (*buffers)["block" + std::to_string(i) + "."] = torch::zeros({size_.experts}, torch::kInt64);
  }

  std::map<std::string, torch::Tensor> parameters;
  std::map<std::string, torch::Tensor> tokens, bias_steps;  // of each block

  /// As the report of DeepSeek-V3 has it.
  void adjust_biases() {
    for (auto& [block, counts] : tokens) {
      for (std::int64_t e = 0; e < size_.experts; ++e) {
        const auto mine = size_.experts * counts[e].item<std::int64_t>(), all = counts.sum().item<std::int64_t>();
        bias_steps[block][e] += mine < all ? 1 : mine > all ? -1 : 0;
      }
      counts.zero_();
    }
  }

  torch::Tensor loss(const Batch& micro_batch) {
    torch::Tensor h = embedding(micro_batch.inputs[0]);
    torch::Tensor balance = torch::zeros({}, torch::kDouble);
    for (int i = 0; i < size_.transformer.layers; ++i) {
      const std::string block = "block" + std::to_string(i) + ".";
      h = h + attention(block + "attention.", h);
      const auto y = norm(block + "mlp_norm", h);
      const auto p = torch::softmax(linear(block + "router", y), -1);
      const auto biased = p.detach() + size_.bias_rate * bias_steps.at(block);
      const auto least = std::get<0>(biased.sort(-1, true)).narrow(-1, size_.top_k - 1, 1);
      const auto chosen = (biased >= least).to(torch::kDouble);
      tokens[block] += chosen.sum(torch::IntArrayRef{0, 1}).to(torch::kInt64);
      const auto shares = p * chosen / (p * chosen).sum(-1, true);
      for (int e = 0; e < size_.experts; ++e) {
        const std::string expert = block + "experts." + std::to_string(e);
        h = h + shares.narrow(-1, e, 1) * linear(expert + "_out", torch::gelu(linear(expert + "_in", y)));
      }
      balance = balance - 1;
      for (int e = 0; e < size_.experts; ++e)
        balance = balance + size_.experts * (chosen.select(-1, e).mean() / size_.top_k) * p.select(-1, e).mean();
    }
    return cross_entropy(linear("norm_head.head", norm("norm_head.norm", h)), micro_batch.targets[0]) +
           kBalance * balance;
  }

 private:
  torch::Tensor linear(const std::string& name, const torch::Tensor& in) const {
    return in.matmul(parameters.at(name + ".weight").t()) + parameters.at(name + ".bias");
  }
  torch::Tensor norm(const std::string& name, const torch::Tensor& in) const {
    const auto centred = in - in.mean(-1, true);
    const auto scaled = centred / (centred.square().mean(-1, true) + 1e-5).sqrt();
    return scaled * parameters.at(name + ".weight") + parameters.at(name + ".bias");
  }
  torch::Tensor embedding(const torch::Tensor& text) const {
    std::vector<torch::Tensor> places;
    for (std::int64_t i = 0; i < text.size(1); ++i) {
      torch::Tensor sum = torch::zeros({}, torch::kDouble);
      for (std::int64_t back = 0; back <= std::min<std::int64_t>(3, i); ++back)
        sum = sum + parameters.at("embedding.bytes" + std::to_string(back) + ".weight")
                        .index_select(0, text.select(1, i - back));
      places.push_back(sum);
    }
    return torch::stack(places, 1);
  }
  torch::Tensor attention(const std::string& name, const torch::Tensor& in) const {
    const int heads = size_.transformer.heads, features = size_.transformer.width / heads;
    const auto all = linear(name + "query_key_value", norm(name + "norm", in));
    const auto place = torch::arange(in.size(1), torch::kDouble);
    const auto distance = place.unsqueeze(1) - place;
    std::vector<torch::Tensor> mixed;
    for (int head = 0; head < heads; ++head) {
      const auto part = [&](int which) {
        return all.narrow(-1, which * size_.transformer.width + head * features, features);
      };
      auto scores = part(0).matmul(part(1).transpose(1, 2)) / std::sqrt(features);
      scores = scores - std::exp2(-8.0 * (head + 1) / heads) * distance;
      mixed.push_back(torch::softmax(scores.masked_fill(distance < 0, -1e300), -1).matmul(part(2)));
    }
    return linear(name + "out", torch::cat(mixed, -1));
  }

  moe::ModelSize size_;
};

Batch random_batch(std::int64_t rows, std::int64_t length, std::uint64_t seed) {
  auto random = at::detail::createCPUGenerator(seed);
  Batch batch;
  batch.inputs = {torch::randint(256, {rows, length}, random, torch::kInt64)};
  batch.targets = {torch::randint(256, {rows, length}, random, torch::kInt64)};
  return batch;
}

double difference(const torch::Tensor& a, const torch::Tensor& b) {
  return (a - b).abs().max().item<double>() / std::max(1e-300, b.abs().max().item<double>());
}

struct Layout {
  int num_ranks;
  int num_pipelines;
  int num_sharing;
  std::string schedule;
  int num_micro_batches;  // of each pipeline
  int layers;
  bool slow = false;
  bool serial = false;
};

void PrintTo(const Layout& layout, std::ostream* out) {
  *out << layout.schedule << " on " << layout.num_pipelines << " pipelines of " << layout.num_ranks << " ranks";
}

class MoeGradients : public ::testing::TestWithParam<Layout> {};

TEST_P(MoeGradients, AreThoseOfAPlainModelInOneProcess) {
  const Layout layout = GetParam();
  const moe::ModelSize size = small(layout.layers);
  constexpr int kSteps = 3;
  constexpr double kRate = 0.2, kLargestNorm = 0.1;
  const auto batch_of = [&](int pipeline, int step) {
    return random_batch(2 * layout.num_micro_batches, size.transformer.context, 100 * step + pipeline);
  };

  // Gradients of each step, after clipping, and the losses.
  Plain plain(size);
  std::vector<std::map<std::string, torch::Tensor>> expected, tokens, bias_steps;
  std::vector<double> losses;
  for (int step = 0; step < kSteps; ++step) {
    torch::Tensor loss = torch::zeros({}, torch::kDouble);
    for (int pipeline = 0; pipeline < layout.num_pipelines; ++pipeline)
      for (const Batch& part : split_batch(batch_of(pipeline, step), layout.num_micro_batches, 0))
        loss = loss + plain.loss(part) / (layout.num_pipelines * layout.num_micro_batches);
    loss.backward();
    for (const auto& [block, counts] : plain.tokens) {
      if (static_cast<int>(tokens.size()) == step) tokens.emplace_back();
      tokens.back()[block] = counts.clone();
    }
    plain.adjust_biases();
    bias_steps.emplace_back();
    for (const auto& [block, steps] : plain.bias_steps) bias_steps.back()[block] = steps.clone();
    losses.push_back(loss.item<double>());
    double squares = 0;
    for (const auto& [name, parameter] : plain.parameters) squares += parameter.grad().square().sum().item<double>();
    ASSERT_GT(std::sqrt(squares), kLargestNorm) << "clipping is part of the test";
    const torch::NoGradGuard no_grad;
    auto& gradients = expected.emplace_back();
    for (auto& [name, parameter] : plain.parameters) {
      gradients[name] = parameter.grad() * (kLargestNorm / (std::sqrt(squares) + 1e-6));
      parameter.sub_(kRate * gradients[name]);
      parameter.mutable_grad().reset();
    }
  }

  run_ranks(layout.num_ranks, [&](std::shared_ptr<Communicator> world) {
    at::set_num_threads(1);  // of this rank; else each takes all cores
    if (layout.slow) world = testing::delayed_links(world, {std::chrono::microseconds(300), 1e8});
    if (layout.serial) world = testing::serial(world);
    const Mesh mesh(world, {.pipeline = layout.num_ranks / layout.num_pipelines,
                            .data = layout.num_pipelines,
                            .expert = layout.num_sharing});
    const DualPipeOptions options{.num_micro_batches = layout.num_micro_batches,
                                  .schedule = layout.schedule,
                                  .compare_replicas_every = 1,
                                  .buffers = moe::buffers()};
    const int stages = make_schedule({layout.schedule, mesh.pipeline()->size(), layout.num_micro_batches}).num_stages;
    DualPipe pipe(mesh, options, split(layers_of(size, mesh.expert()), stages, moe::layer_costs(size)), moe::is_expert);
    for (int step = 0; step < kSteps; ++step) {
      const StepResult result = pipe->step(batch_of(mesh.replica(), step), loss_of);
      EXPECT_NEAR(result.loss.item<double>(), losses[step], 1e-12) << "step " << step;
      const auto expect_buffers = [&](const std::string& suffix, const auto& truth) {
        for (const auto& item : pipe->named_buffers()) {
          const std::size_t begin = item.key().find('.') + 1, end = item.key().find("router_");
          if (item.key().substr(end) != suffix) continue;
          EXPECT_TRUE(torch::equal(item.value(), truth.at(item.key().substr(begin, end - begin))))
              << "step " << step << ": " << item.key() << item.value();
        }
      };
      expect_buffers("router_tokens", tokens[step]);
      moe::adjust_biases(*pipe);
      expect_buffers("router_bias_steps", bias_steps[step]);
      pipe->clip_grad_norm_(kLargestNorm);
      const torch::NoGradGuard no_grad;
      int num_experts = 0, num_blocks = 0;
      for (auto& item : pipe->named_parameters()) {
        num_experts += moe::is_expert(item.key()) ? 1 : 0;
        num_blocks += item.key().ends_with(".router.bias") ? 1 : 0;
        const std::string name = item.key().substr(item.key().find('.') + 1);
        EXPECT_LE(difference(item.value().grad(), expected[step].at(name)), 1e-10) << "step " << step << ": " << name;
        item.value().sub_(kRate * item.value().grad());
        item.value().mutable_grad().reset();
      }
      // Two layers with weight and bias each, of this rank's part of the experts.
      EXPECT_EQ(num_experts, num_blocks * 4 * size.experts / layout.num_sharing);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Moe, MoeGradients,
                         ::testing::Values(Layout{2, 1, 1, "dualpipe", 4, 2},         // one pipeline, no peers
                                           Layout{4, 2, 2, "dualpipe", 4, 2},         // a block on each stage
                                           Layout{4, 2, 2, "dualpipe", 4, 2, true},   //
                                           Layout{4, 2, 2, "dualpipev", 4, 3, true},  //
                                           Layout{8, 4, 2, "dualpipe", 4, 2, false, true},
                                           Layout{8, 4, 2, "dualpipev", 4, 3, false, true},
                                           Layout{8, 4, 2, "zbv", 4, 3, false, true},
                                           Layout{4, 4, 2, "1f1b", 2, 1},       // two sets of experts
                                           Layout{8, 4, 4, "dualpipe", 2, 1}),  // one expert on each rank
                         [](const ::testing::TestParamInfo<Layout>& layout_of) {
                           const Layout& layout = layout_of.param;
                           return std::to_string(layout.num_ranks) + "_ranks_" + std::to_string(layout.num_pipelines) +
                                  "_pipelines_sharing_" + std::to_string(layout.num_sharing) + "_" + layout.schedule +
                                  (layout.slow     ? "_slow"
                                   : layout.serial ? "_one_at_a_time"
                                                   : "");
                         });

TEST(CountingDevice, NotesWhatMakesAHostWait) {
  const torch::Tensor x = torch::arange(4).to(test::counting_device);
  test::take_host_waits();
  EXPECT_EQ((x + x).sum().item<std::int64_t>(), 12);
  EXPECT_THAT(test::take_host_waits(), ElementsAre("aten::_local_scalar_dense"));
  (void)x.index({x > 1});
  EXPECT_THAT(test::take_host_waits(), Contains("aten::nonzero"));
  (void)torch::bincount(x, {}, 4);
  EXPECT_THAT(test::take_host_waits(), Contains("aten::bincount"));
  (void)x.cpu();
  (void)x.to(torch::kCPU, torch::kLong, /*non_blocking=*/true);
  EXPECT_THAT(test::take_host_waits(), ElementsAre("blocking copy to the host", "copy to the host"));
}

/// One micro-batch through all layers and back, on ranks that share the experts.
struct LayersRun {
  std::vector<std::string> waits;
  std::map<std::string, torch::Tensor> gradients;
};
std::vector<LayersRun> run_layers(at::Device device) {
  constexpr int kRanks = 2;
  const moe::ModelSize size = small(2);
  std::vector<LayersRun> seen(kRanks);
  const auto body = [&](const std::shared_ptr<Communicator>& group) {
    at::set_num_threads(1);
    LayersRun& mine = seen[group->rank()];
    const std::vector<NamedLayer> layers = layers_of(size, group);
    std::vector<Stage> stages;
    for (const NamedLayer& layer : layers) {
      stages.push_back(layer.make());
      stages.back().module()->to(device);
    }
    for (int micro_batch = 0; micro_batch < 2; ++micro_batch) {
      const Batch batch = random_batch(2, size.transformer.context, 5 + group->rank());
      const Tensors targets{batch.targets[0].to(device)};
      Tensors values{batch.inputs[0].to(device)};
      test::take_host_waits();
      std::vector<std::unique_ptr<StageRun>> runs;
      for (const Stage& stage : stages) {
        StageLoss loss;
        if (&stage == &stages.back()) loss = [&](const Tensors& outputs) { return loss_of(outputs, targets); };
        const StageContext context{.stage = static_cast<int>(runs.size()), .micro_batch = micro_batch};
        StageRun& run = *runs.emplace_back(std::make_unique<StageRun>(stage, values, context, loss));
        while (!run.advanced()) run.advance();
        run.finish_forward();
        values = run.outputs();
      }
      Tensors gradients{torch::ones({}, at::device(device).dtype(torch::kDouble))};
      for (std::size_t s = runs.size(); s-- > 0;) gradients = runs[s]->backward(gradients);
      mine.waits = test::take_host_waits();  // the first micro-batch moves what the modules keep elsewhere
    }
    for (std::size_t s = 0; s < stages.size(); ++s)
      for (const auto& item : stages[s].module()->named_parameters())
        mine.gradients[layers[s].name + "." + item.key()] = item.value().grad().cpu();
  };
  run_ranks(kRanks, body, {.device = device});
  return seen;
}

TEST(MoeStages, WaitForTheirDeviceOnlyWhereADispatchIsLaunched) {
  const std::vector<LayersRun> on_host = run_layers(at::kCPU), on_device = run_layers(test::counting_device);
  for (std::size_t rank = 0; rank < on_host.size(); ++rank) {
    // Of two blocks. On a device each dispatch copies its splits, and waits for the event behind that.
    EXPECT_THAT(on_device[rank].waits, ElementsAre("copy to the host", "event", "copy to the host", "event"));
    EXPECT_THAT(on_host[rank].waits, ::testing::IsEmpty());
    for (const auto& [name, gradient] : on_host[rank].gradients)
      EXPECT_LE(difference(on_device[rank].gradients.at(name), gradient), 1e-10) << name;
  }
}

class MoeProgram : public test::ExampleProgram {
 protected:
  MoeProgram()
      : ExampleProgram(
            DUALPIPE_MOE,
            {{"--layers", "2"}, {"--experts", "4"}, {"--expert-width", "16"}, {"--steps", "3"}, {"--sample", "5"}}) {}
};

struct Line {
  double loss, balance;
};
std::vector<Line> lines_of(const std::string& output) {
  std::vector<Line> found;
  const std::regex line("step [0-9]+  loss ([0-9.]+)  balance loss ([0-9.-]+)");
  for (std::sregex_iterator it(output.begin(), output.end(), line), end; it != end; ++it)
    found.push_back({std::stod((*it)[1]), std::stod((*it)[2])});
  return found;
}

/// The numbers of each expert, by block and what they are.
using Routed = std::map<std::pair<std::string, std::string>, std::vector<std::int64_t>>;
Routed routed_of(const std::string& output) {
  Routed found;
  const std::regex line("(block[0-9]+) +(first step|last step|bias raised)((?: +[+-]?[0-9]+)+) ");
  for (std::sregex_iterator it(output.begin(), output.end(), line), end; it != end; ++it) {
    std::istringstream numbers((*it)[3]);
    std::vector<std::int64_t>& of_block = found[{(*it)[1], (*it)[2]}];
    for (std::int64_t number = 0; numbers >> number;) of_block.push_back(number);
    EXPECT_EQ(of_block.size(), 4u);
  }
  return found;
}

TEST_F(MoeProgram, HoweverRanksFormPipelinesTheyTrainTheSameModel) {
  std::vector<Line> first;
  Routed first_routed;
  const std::vector<std::pair<int, std::vector<std::string>>> runs = {
      {2, {"--pipelines", "1", "--microbatches", "8"}},
      {4, {"--pipelines", "2", "--microbatches", "4"}},
      {4, {"--pipelines", "4", "--microbatches", "2", "--schedule", "1f1b", "--expert-parallel", "2"}},
      {4, {"--pipelines", "2", "--microbatches", "4", "--link-latency-ms", "1"}},
  };
  for (const auto& [num_ranks, flags] : runs) {
    const std::string text = output(num_ranks, flags);
    const auto lines = lines_of(text);
    ASSERT_EQ(lines.size(), 3u) << text;
    EXPECT_THAT(text, AllOf(HasSubstr("held-out loss:"), HasSubstr("sample"), HasSubstr("hidden under compute")));
    const Routed routed = routed_of(text);
    if (first.empty()) {
      first = lines;
      first_routed = routed;
    }
    for (const std::string block : {"block0", "block1"}) {
      EXPECT_EQ(routed.at({block, "first step"}), first_routed.at({block, "first step"})) << "the same weights";
      const std::int64_t sent = std::accumulate(routed.at({block, "first step"}).begin(),
                                                routed.at({block, "first step"}).end(), std::int64_t{0});
      EXPECT_EQ(sent % 8, 0) << "micro-batches";
      EXPECT_GT(sent, 0);
      EXPECT_EQ(std::accumulate(routed.at({block, "last step"}).begin(), routed.at({block, "last step"}).end(),
                                std::int64_t{0}),
                sent);
      for (const std::int64_t steps : routed.at({block, "bias raised"})) EXPECT_LE(std::abs(steps), 3);
      EXPECT_THAT(routed.at({block, "bias raised"}), ::testing::Contains(::testing::Ne(0)));
    }
    EXPECT_NEAR(first[0].loss, std::log(256), 0.2) << "it knows nothing yet";
    for (std::size_t step = 0; step < lines.size(); ++step) {
      EXPECT_NEAR(lines[step].loss, first[step].loss, 2e-3) << "step " << step;
      EXPECT_NEAR(lines[step].balance, first[step].balance, 2e-4) << "step " << step;
    }
  }
  expect_trace_is_reported();
}

TEST_F(MoeProgram, TrainsInBfloat16) {
  Line first{};
  for (const std::string dtype : {"float32", "bf16"}) {
    const std::string text = output(4, {"--microbatches", "4", "--dtype", dtype});
    const auto lines = lines_of(text);
    ASSERT_EQ(lines.size(), 3u) << text;
    if (dtype == "float32") first = lines[0];
    EXPECT_NEAR(lines[0].loss, first.loss, 0.01);
    EXPECT_NEAR(lines[0].balance, first.balance, 0.1 * std::abs(first.balance)) << "experts are chosen in float32";
  }
}

TEST_F(MoeProgram, WrongInputIsOneClearError) {
  EXPECT_THAT(failure(3, {}), AllOf(HasSubstr("3 ranks"), HasSubstr("2"), HasSubstr("--pipelines")));
  EXPECT_THAT(failure(4, {"--experts", "3"}), AllOf(HasSubstr("3 experts"), HasSubstr("2 pipelines")));
  EXPECT_THAT(failure(4, {"--top-k", "5"}), AllOf(HasSubstr("1 to 4 experts"), HasSubstr("--top-k 5")));
  EXPECT_THAT(failure(4, {"--pipelines", "4", "--expert-parallel", "3"}),
              AllOf(HasSubstr("3 pipelines"), HasSubstr("--expert-parallel")));
}

}  // namespace
}  // namespace dualpipe
