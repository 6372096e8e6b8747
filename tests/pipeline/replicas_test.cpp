// Copies of a stage on several ranks, and parameters that several stages share.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

/// The one text of the InvalidArgument that all ranks throw in their constructors; "" if none throws.
std::string construction(const std::string& kind, int num_ranks, const StageFactory& factory) {
  std::mutex mutex;
  std::set<std::string> texts;
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
    std::string text;
    try {
      DualPipe(comm, {.num_micro_batches = kMicroBatches, .schedule = kind}, factory);
    } catch (const InvalidArgument& error) {
      text = error.what();
    }
    comm->barrier().wait();  // it stays usable
    const std::lock_guard lock(mutex);
    texts.insert(text);
  });
  EXPECT_EQ(texts.size(), 1u) << ::testing::PrintToString(texts);
  return *texts.begin();
}

class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  std::vector<std::string> texts;
};

// --- tied parameters

TEST(TiedParameters, OfStagesOnDifferentRanksAreAnError) {
  Layer shared(0);
  const StageFactory factory = [&](int stage) { return stage == 0 || stage == 3 ? shared : Layer(stage); };
  for (const std::string kind : {"1f1b", "zb1p", "gpipe"}) {
    SCOPED_TRACE(kind);
    EXPECT_THAT(
        construction(kind, kRanks, factory),
        AllOf(HasSubstr("stages 0 and 3 share a parameter, 'weight' of the one and 'weight' of the other"),
              HasSubstr("dualpipe, dualpipev and zbv"), HasSubstr("let the first of the stages return the weight")));
  }
  // Two of a rank's own stages: of four on two ranks, 0 and 2 are on the same one.
  EXPECT_EQ(construction("interleaved", 2, [](int stage) { return Layer(stage); }), "");
  EXPECT_THAT(construction("interleaved", 2, factory), HasSubstr("stages 0 and 3 share a parameter"));
  // A view is another tensor with the same memory.
  struct Transposed : torch::nn::Module {
    explicit Transposed(const at::Tensor& weight) { weight_ = register_parameter("head", weight.detach().t()); }
    at::Tensor forward(const at::Tensor& x) { return x.matmul(weight_); }
    at::Tensor weight_;
  };
  EXPECT_THAT(construction("1f1b", kRanks,
                           [&](int stage) -> Stage {
                             if (stage == 3) return as_stage(std::make_shared<Transposed>(shared->weight));
                             return as_stage(stage == 0 ? shared : Layer(stage));
                           }),
              HasSubstr("'weight' of the one and 'head' of the other"));
}

/// As tied stages of rank processes look, and stages that are seeded alike.
TEST(TiedParameters, StagesThatBeginWithEqualWeightsAreNamedInOneWarning) {
  const auto said = [](const std::string& kind, const StageFactory& factory) {
    std::vector<std::string> texts;
    run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
      Warnings warnings;
      const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
      DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = kind}, factory);
      if (comm->rank() == 0) texts = warnings.texts;
    });
    return texts;
  };
  for (const std::string kind : {"1f1b", "dualpipe", "interleaved"}) {
    const auto texts = said(kind, [](int) { return Layer(7); });
    ASSERT_EQ(texts.size(), 1u) << kind;
    EXPECT_THAT(texts[0], AllOf(HasSubstr("stages 0 and 1 begin with equal values"), HasSubstr("'weight'"),
                                HasSubstr("seed each stage by its number")));
    EXPECT_THAT(said(kind, as_factory(layer)), ::testing::IsEmpty()) << kind;
  }
  // Norms begin alike everywhere, and stages of the same ranks may be tied.
  EXPECT_THAT(said("1f1b", [](int) { return torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})); }),
              ::testing::IsEmpty());
  EXPECT_THAT(said("dualpipe", [](int stage) { return Layer(std::min(stage, kRanks - 1 - stage)); }),
              ::testing::IsEmpty());
}

TEST(TiedParameters, OfRanksThatAreThreadsAreAnError) {
  std::vector<Layer> model;
  for (int s = 0; s < kRanks; ++s) model.emplace_back(s);
  EXPECT_THAT(construction("dualpipe", kRanks, [&](int stage) { return model[stage]; }),
              AllOf(HasSubstr("ranks 1 and 2 are threads of one process"), HasSubstr("'weight' of stage 1"),
                    HasSubstr("each time it is called")));
}

TEST(TiedParameters, AWeightHandedOnAsAnActivation) {
  // The way out that the error names: the first stage's weight is used by the last one too.
  Batch batch = random_batch(16, 8);
  std::vector<Layer> model;
  for (int s = 0; s < kRanks; ++s) model.emplace_back(s);
  for (const Batch& part : split_batch(batch, kMicroBatches, 0)) {
    at::Tensor x = part.inputs[0];
    for (Layer& module : model) x = module->forward(x);
    (torch::mse_loss(x.matmul(model[0]->weight.t()), part.targets[0]) / kMicroBatches).backward();
  }
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = "1f1b"}, [](int stage) {
      Layer module(stage);
      return Stage(module).compute("layer", [module, stage](const Tensors& x) mutable {
        const at::Tensor y = module->forward(x[0]);
        if (stage == 0) return Tensors{y, module->weight};
        return stage + 1 == kRanks ? Tensors{y.matmul(x[1].t())} : Tensors{y, x[1]};
      });
    });
    pipe->step(batch, squared_error());
    for (const auto& child : pipe->named_children())
      for (const auto& item : child.value()->named_parameters())
        EXPECT_LE(difference(item.value().grad(), model[comm->rank()]->named_parameters()[item.key()].grad()), 1e-12);
  });
}

TEST(TiedParameters, ThatAStageUsesWithoutRegisteringThemAreAnError) {
  run_ranks(kRanks, [](std::shared_ptr<Communicator> comm) {
    Layer first(0);  // as in a process: each rank has its own
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = "1f1b"}, [first](int stage) {
      Layer module = stage == 0 ? first : Layer(stage);
      return Stage(module).compute("layer", [=](const at::Tensor& x) mutable {
        const at::Tensor y = module->forward(x);
        return stage + 1 == kRanks ? y.matmul(first->weight.t()) : y;
      });
    });
    EXPECT_THAT(message_of([&] { pipe->step(random_batch(16, 1), squared_error()); }),
                AllOf(HasSubstr("stage 3, its loss included, uses a tensor of sizes [6, 6]"),
                      HasSubstr("Register it with the stage's module")));
  });
}

/// As a stage does that differentiates within its forward.
TEST(TiedParameters, TensorsThatAForwardMakesForItselfAreNone) {
  run_ranks(kRanks, [](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, [](int stage) {
      Layer module(stage);
      return Stage(module).compute("layer", [=](const at::Tensor& x) mutable {
        const at::Tensor fresh = x.detach().requires_grad_();
        return module->forward(x) + 0 * fresh;
      });
    });
    pipe->step(random_batch(16, 1), squared_error());
  });
}

TEST(TiedParameters, OfALossAreAnError) {
  run_ranks(kRanks, [](std::shared_ptr<Communicator> comm) {
    const auto scale = torch::ones({kWidth}, f64()).requires_grad_();
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, as_factory(layer));
    const auto loss = [&](const at::Tensor& output, const at::Tensor& target) {
      return torch::mse_loss(output * scale, target);
    };
    pipe->evaluate(random_batch(16, 1), loss);  // trains nothing
    EXPECT_THAT(message_of([&] { pipe->step(random_batch(16, 1), loss); }),
                HasSubstr("its loss included, uses a tensor of sizes [6]"));
  });
}

// --- copies that drift

/// Renormalizes its weight in each forward, as Embedding does with max_norm.
struct RenormalizedImpl : torch::nn::Module {
  explicit RenormalizedImpl(int number) : layer(register_module("layer", Layer(number))) {}
  at::Tensor forward(const at::Tensor& x) {
    {
      const torch::NoGradGuard no_grad;
      layer->weight.data().mul_(1 + 1e-9 * x.detach().mean());
    }
    return layer->forward(x);
  }
  Layer layer;
};
TORCH_MODULE(Renormalized);

/// Counts the micro-batches it has seen, in an integer buffer.
struct CountingImpl : torch::nn::Module {
  explicit CountingImpl(int number) : layer(register_module("layer", Layer(number))) {
    seen = register_buffer("seen", torch::zeros({}, torch::kLong));
  }
  at::Tensor forward(const at::Tensor& x) {
    seen.add_(static_cast<std::int64_t>(x.size(0)));
    return layer->forward(x);
  }
  Layer layer;
  at::Tensor seen;
};
TORCH_MODULE(Counting);

TEST(Replicas, ThatDriftAreAnErrorInEveryNthStep) {
  const Batch batch = random_batch(16, 3);
  std::vector<Batch> uneven;
  for (int m = 0; m < kMicroBatches; ++m) uneven.push_back(random_batch(m < 4 ? 1 : 3, 10 + m));
  for (const bool counts : {false, true}) {
    SCOPED_TRACE(counts ? "counter" : "weight");
    std::mutex mutex;
    std::set<std::string> texts;
    run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .compare_replicas_every = 3}, [&](int stage) -> Stage {
        if (stage != 1) return as_stage(Layer(stage));
        return counts ? as_stage(Counting(stage)) : as_stage(Renormalized(stage));
      });
      const auto step = [&] {
        pipe->zero_grad();
        pipe->step(counts ? Batch::from_micro_batches(uneven) : batch, squared_error());
      };
      for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 3; ++i) step();
        pipe->zero_grad();
        std::string text = "no error";
        try {
          step();
        } catch (const InvalidArgument& error) {
          text = error.what();
        }
        for (const at::Tensor& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
        {
          const std::lock_guard lock(mutex);
          texts.insert(text);
        }
        pipe->broadcast_parameters();  // the way out
      }
    });
    ASSERT_EQ(texts.size(), 1u) << ::testing::PrintToString(texts);
    EXPECT_THAT(*texts.begin(), AllOf(HasSubstr(counts ? "buffer 'seen' of stage 1 on ranks 1 and 2"
                                                       : "parameter 'layer.weight' of stage 1 on ranks 1 and 2"),
                                      HasSubstr("broadcast_parameters()"), HasSubstr("compare_replicas_every")));
  }
}

TEST(Replicas, AreComparedInTheFirstStepUnlessToldOtherwise) {
  for (const int every : {100, 0}) {
    run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, {.num_micro_batches = 4, .compare_replicas_every = every}, [](int s) { return Layer(s); });
      if (comm->rank() == 1) pipe->parameters().back().data().add_(1);  // as if weights were loaded on one rank alone
      const std::string text = message_of([&] { pipe->step(random_batch(8, 1), squared_error()); });
      EXPECT_THAT(text, every == 0 ? ::testing::Matcher<std::string>("")
                                   : HasSubstr("parameter 'bias' of stage 1 on ranks 0 and 1"));
    });
  }
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    EXPECT_THAT(message_of([&] {
                  DualPipe(comm, {.num_micro_batches = 4, .compare_replicas_every = -1},
                           [](int s) { return Layer(s); });
                }),
                HasSubstr("compare_replicas_every must not be negative, got -1"));
  });
}

// --- buffers that holders change in different ways

TEST(Replicas, BuffersThatAreLostAreNamedInOneWarning) {
  struct NormalizedImpl : torch::nn::Module {
    explicit NormalizedImpl(int number)
        : layer(register_module("layer", Layer(number))),
          norm(register_module("norm", torch::nn::BatchNorm1d(kWidth))) {
      norm->to(torch::kDouble);
      register_buffer("constant", torch::ones({2}));
    }
    at::Tensor forward(const at::Tensor& x) { return norm->forward(layer->forward(x)); }
    Layer layer;
    torch::nn::BatchNorm1d norm;
  };
  for (const std::string kind : {"dualpipe", "dualpipev"}) {
    std::vector<std::vector<std::string>> said(2);
    run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
      Warnings warnings;
      const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
      DualPipe pipe(comm, {.num_micro_batches = 4, .schedule = kind}, [](int stage) -> Stage {
        return stage == 1 ? as_stage(std::make_shared<NormalizedImpl>(stage)) : as_stage(Layer(stage));
      });
      for (int i = 0; i < 3; ++i) pipe->step(random_batch(16, 5 + i), squared_error());
      said[comm->rank()] = warnings.texts;
    });
    EXPECT_TRUE(said[1].empty());
    if (kind == "dualpipev") {
      EXPECT_TRUE(said[0].empty()) << ::testing::PrintToString(said[0]);
      continue;
    }
    ASSERT_EQ(said[0].size(), 1u);
    EXPECT_THAT(said[0][0], AllOf(HasSubstr("buffer 'norm.running_mean' of stage 1 on ranks 0 and 1"),
                                  HasSubstr("'norm.running_var'"), Not(HasSubstr("constant")),
                                  Not(HasSubstr("num_batches_tracked")), HasSubstr("GroupNorm")));
  }
}

// --- buffers that become one

/// A pipeline's kind and its mesh.
struct Layout {
  std::string kind;
  MeshShape mesh;
};

/// What the holders of stage 0 run in each replica, as they begin and end.
std::vector<std::pair<int, int>> micro_batches_of_holders(const std::string& kind) {
  if (kind == "dualpipe") return {{0, kMicroBatches / 2}, {kMicroBatches / 2, kMicroBatches}};
  return {{0, kMicroBatches}};
}

class Buffers : public ::testing::TestWithParam<Layout> {};

INSTANTIATE_TEST_SUITE_P(
    Layouts, Buffers,
    ::testing::Values(Layout{"dualpipe", {.pipeline = 2}}, Layout{"dualpipe", {.pipeline = 4}},
                      Layout{"dualpipe", {.pipeline = 2, .data = 2}}, Layout{"dualpipev", {.pipeline = 2}},
                      Layout{"dualpipev", {.pipeline = 2, .data = 3}}, Layout{"1f1b", {.pipeline = 2, .data = 2}},
                      Layout{"interleaved", {.pipeline = 2, .data = 2}}, Layout{"zb1p", {.pipeline = 2, .data = 2}},
                      Layout{"zbv", {.pipeline = 2, .data = 2}}),
    [](const auto& layout) {
      return layout.param.kind + std::to_string(layout.param.mesh.pipeline) + "x" +
             std::to_string(layout.param.mesh.data);
    });

/// Tokens of each of four experts, as a router counts them.
struct RouterImpl : torch::nn::Module {
  explicit RouterImpl(int number) : layer(register_module("layer", Layer(number))) {
    tokens = register_buffer("tokens", torch::zeros({4}, torch::kInt64));
    share = register_buffer("share", torch::zeros({}, torch::kDouble));
    open = register_buffer("open", torch::full({3}, -std::numeric_limits<double>::infinity(), torch::kDouble));
    open[0] = 1;
    seen = register_buffer("seen", torch::zeros({}, torch::kInt64));
  }
  at::Tensor forward(const at::Tensor& x) {
    tokens.add_(torch::bincount(x.detach().narrow(1, 0, 4).argmax(1), {}, 4));
    share.add_(x.detach().mean());
    seen.add_(x.size(0) * static_cast<std::int64_t>(1 + x.detach().sum().abs().item<double>() * 100));
    return layer->forward(x);
  }
  Layer layer;
  at::Tensor tokens, share, open, seen;
};
TORCH_MODULE(Router);

TEST_P(Buffers, CountersAddUpExactly) {
  const auto& [kind, shape] = GetParam();
  constexpr int kSteps = 2;
  const auto batch_of = [](int step, int replica) {
    return random_batch(4 * kMicroBatches, 100 + 10 * static_cast<std::uint64_t>(step) + replica);
  };
  at::Tensor tokens = torch::zeros({4}, torch::kInt64), share = torch::zeros({}, torch::kDouble);
  for (int step = 0; step < kSteps; ++step)
    for (int replica = 0; replica < shape.data; ++replica)
      for (const Batch& part : split_batch(batch_of(step, replica), kMicroBatches, 0)) {
        tokens += torch::bincount(part.inputs[0].narrow(1, 0, 4).argmax(1), {}, 4);
        share += part.inputs[0].mean();
      }
  run_ranks(shape.size(), [&, &k = kind, &s = shape](std::shared_ptr<Communicator> comm) {
    const Mesh mesh(comm, s);
    Warnings warnings;
    const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
    DualPipe pipe(mesh,
                  {.num_micro_batches = kMicroBatches,
                   .schedule = k,
                   .compare_replicas_every = 1,
                   .buffers = {{"router.tokens", BufferReduction::sum},
                               {"tokens", BufferReduction::mean},  // a shorter name, for other buffers
                               {"share", BufferReduction::sum},
                               {"open", BufferReduction::mean},
                               {"seen", BufferReduction::local}}},
                  [](int stage) -> Stage {
                    if (stage > 0) {
                      Layer layer(stage);
                      layer->register_buffer("tokens", torch::zeros({2}, torch::kDouble));
                      return as_stage(layer);
                    }
                    Router router(stage);
                    auto holder = std::make_shared<torch::nn::Module>("Holder");
                    holder->register_module("router", router.ptr());
                    return Stage(holder).compute(
                        "router", [router](const torch::Tensor& x) mutable { return router->forward(x); });
                  });
    for (int step = 0; step < kSteps; ++step) pipe->step(batch_of(step, mesh.replica()), squared_error());
    EXPECT_TRUE(warnings.texts.empty()) << ::testing::PrintToString(warnings.texts);
    if (!pipe->feeds_inputs()) return;
    const auto buffers = pipe->named_buffers();
    EXPECT_TRUE(torch::equal(buffers["stage0.router.tokens"], tokens)) << buffers["stage0.router.tokens"];
    EXPECT_LE(difference(buffers["stage0.router.share"], share), 1e-12);
    EXPECT_EQ(buffers["stage0.router.open"][1].item<double>(), -std::numeric_limits<double>::infinity());
    EXPECT_EQ(buffers["stage0.router.open"][0].item<double>(), 1);
  });
}

TEST_P(Buffers, RunningStatisticsAreThoseOfAllHolders) {
  const int num_threads = at::get_num_threads();
  at::set_num_threads(1);  // BatchNorm takes all cores, in each rank
  const auto& [kind, shape] = GetParam();
  constexpr int kSteps = 2;
  const auto batch_of = [](int step, int replica) {
    return random_batch(4 * kMicroBatches, 100 + 10 * static_cast<std::uint64_t>(step) + replica);
  };
  const auto norm_of = [](std::optional<double> momentum) {
    torch::nn::BatchNorm1d norm(torch::nn::BatchNorm1dOptions(kWidth).momentum(momentum));
    norm->to(torch::kDouble);
    return norm;
  };
  for (const std::optional<double> momentum : {std::optional(0.1), std::optional<double>()}) {
    // One process: each holder begins with the mean of all.
    at::Tensor mean = torch::zeros({kWidth}, f64()), variance = torch::ones({kWidth}, f64());
    std::int64_t count = 0;
    auto whole = norm_of(momentum);  // over all micro-batches of the first step
    for (int step = 0; step < kSteps; ++step) {
      at::Tensor means = torch::zeros({kWidth}, f64()), variances = torch::zeros({kWidth}, f64());
      std::int64_t counted = 0;
      int holders = 0;
      for (int replica = 0; replica < shape.data; ++replica) {
        const auto parts = split_batch(batch_of(step, replica), kMicroBatches, 0);
        for (const auto& [first, last] : micro_batches_of_holders(kind)) {
          auto norm = norm_of(momentum);
          norm->running_mean.copy_(mean);
          norm->running_var.copy_(variance);
          norm->num_batches_tracked.fill_(count);
          for (int m = first; m < last; ++m) {
            norm->forward(parts[m].inputs[0]);
            if (step == 0) whole->forward(parts[m].inputs[0]);
          }
          means += norm->running_mean;
          variances += norm->running_var;
          counted += norm->num_batches_tracked.item<std::int64_t>() - count;
          ++holders;
        }
      }
      mean = means / holders;
      variance = variances / holders;
      count += counted;
      if (step == 0 && !momentum) {  // averages are those of one process then
        EXPECT_LE(difference(mean, whole->running_mean), 1e-12);
        EXPECT_LE(difference(variance, whole->running_var), 1e-12);
      }
    }
    EXPECT_EQ(count, std::int64_t{kSteps} * kMicroBatches * shape.data);
    run_ranks(shape.size(), [&, &k = kind, &s = shape](std::shared_ptr<Communicator> comm) {
      at::set_num_threads(1);
      const Mesh mesh(comm, s);
      DualPipe pipe(mesh,
                    {.num_micro_batches = kMicroBatches,
                     .schedule = k,
                     .compare_replicas_every = 1,
                     .buffers = {{"running_mean", BufferReduction::mean},
                                 {"running_var", BufferReduction::mean},
                                 {"num_batches_tracked", BufferReduction::sum}}},
                    [&](int stage) -> Stage {
                      if (stage > 0) return as_stage(Layer(stage));
                      return as_stage(norm_of(momentum));
                    });
      for (int step = 0; step < kSteps; ++step) pipe->step(batch_of(step, mesh.replica()), squared_error());
      if (!pipe->feeds_inputs()) return;
      const auto buffers = pipe->named_buffers();
      EXPECT_LE(difference(buffers["stage0.running_mean"], mean), 1e-12);
      EXPECT_LE(difference(buffers["stage0.running_var"], variance), 1e-12);
      EXPECT_EQ(buffers["stage0.num_batches_tracked"].item<std::int64_t>(), count);
    });
  }
  at::set_num_threads(num_threads);
}

TEST(Replicas, RulesForBuffersThatCannotBeAreNamedOnAllRanks) {
  const auto failure = [](const std::map<std::string, BufferReduction>& rules) {
    return failure_on_all(2, [&](std::shared_ptr<Communicator> comm) {
      const auto make = [&](const std::map<std::string, BufferReduction>& buffers) {
        return DualPipe(comm, {.num_micro_batches = 4, .buffers = buffers}, [](int stage) -> Stage {
          return stage == 0 ? as_stage(Router(stage)) : as_stage(Layer(stage));
        });
      };
      const std::string text = message_of([&] { make(rules); });
      make({{"tokens", BufferReduction::sum}})
          ->step(random_batch(8, 1), squared_error());  // the communicator is usable
      throw InvalidArgument(text);
    });
  };
  EXPECT_THAT(failure({{"okens", BufferReduction::sum}}), HasSubstr("names 'okens', but no buffer"));
  EXPECT_THAT(failure({{"", BufferReduction::sum}}), HasSubstr("names '', but no buffer"));
  EXPECT_THAT(failure({{"tokens", BufferReduction::mean}}),
              AllOf(HasSubstr("tokens is to be a mean"), HasSubstr("buffer 'tokens' of stage 0 is of type Long")));
}

// --- two pipelines in one world

TEST(Replicas, ErrorsNameRanksOfTheWorld) {
  run_ranks(4, [&](std::shared_ptr<Communicator> world) {
    const auto comm = world->split(world->rank() / 2, world->rank());
    const bool second = world->rank() >= 2;
    EXPECT_EQ(comm->world_rank(1), second ? 3 : 1);
    {
      DualPipe pipe(comm, {.num_micro_batches = 4}, [](int s) { return Layer(s); });
      if (world->rank() == 3) pipe->parameters()[0].data().add_(1);
      EXPECT_THAT(message_of([&] { pipe->step(random_batch(8, 1), squared_error()); }),
                  second ? HasSubstr("on ranks 2 and 3") : ::testing::Matcher<std::string>(""));
    }
    DualPipe pipe(comm, {.num_micro_batches = 4}, [&](int stage) {
      Layer module(stage);
      return Stage(module).compute("layer", [=](const at::Tensor& x) mutable {
        if (second && stage == 1) throw std::runtime_error("no more");
        return module->forward(x);
      });
    });
    world->commit("");  // a barrier could hear of the failure that follows
    const std::string text = message_of([&] { pipe->step(random_batch(8, 1), squared_error()); });
    if (!second) return;
    EXPECT_THAT(text, AllOf(::testing::ContainsRegex("rank [23]: forward of stage 1"), HasSubstr("\nrank 3")));
    EXPECT_THAT(text, Not(::testing::AnyOf(HasSubstr("rank 0"), HasSubstr("rank 1"))));
  });
}

}  // namespace
}  // namespace dualpipe::test
