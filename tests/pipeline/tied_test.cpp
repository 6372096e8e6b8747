// Weights that stages of several ranks tie, and stages that use parts of one model: as one process trains it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/train/sharded_optimizer.hpp"
#include "pipeline/pipeline.hpp"
#include "pipeline/same_bits.hpp"
#include "pipeline/tied.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kSteps = 3;
constexpr double kLargestNorm = 0.05;

struct TiedCase {
  std::string kind;
  int num_ranks;  // of a pipeline
  int num_replicas = 1;
};

struct TiedTruth {
  std::map<std::string, at::Tensor> gradients;  // of the first step
  std::vector<double> norms;
  std::map<std::string, at::Tensor> weights;  // at the end
};

std::vector<Batch> tied_batches(int step, int rows, int num_replicas) {
  std::vector<Batch> batches;
  for (int replica = 0; replica < num_replicas; ++replica)
    batches.push_back(token_batch(rows, 100 * step + 10 * replica + 1));
  return batches;
}

std::unique_ptr<torch::optim::Optimizer> tied_adamw(std::vector<at::Tensor> parameters) {
  return std::make_unique<torch::optim::AdamW>(std::move(parameters), torch::optim::AdamWOptions(0.01));
}

TiedTruth tied_truth(int num_stages, int num_micro_batches, int num_replicas) {
  TiedTruth truth;
  TiedModel model(num_stages);
  const auto optimizer = tied_adamw(model->parameters());
  for (int step = 0; step < kSteps; ++step) {
    optimizer->zero_grad();
    tied_step(model, tied_batches(step, 2 * num_micro_batches, num_replicas), num_micro_batches);
    for (const auto& item : model->named_parameters())
      if (step == 0) truth.gradients[item.key()] = item.value().grad().clone();
    truth.norms.push_back(torch::nn::utils::clip_grad_norm_(model->parameters(), kLargestNorm));
    EXPECT_GT(truth.norms.back(), kLargestNorm) << "clipping is part of the test";
    optimizer->step();
  }
  for (const auto& item : model->named_parameters()) truth.weights[item.key()] = item.value().detach();
  return truth;
}

class Tied : public ::testing::TestWithParam<TiedCase> {};

TEST_P(Tied, GradientsNormsAndWeightsEqualOneProcess) {
  const auto& [kind, num_ranks, num_replicas] = GetParam();
  const int num_micro_batches = 2 * num_ranks;
  const int num_stages = make_schedule({kind, num_ranks, num_micro_batches}).num_stages;
  const TiedTruth truth = tied_truth(num_stages, num_micro_batches, num_replicas);
  for (const auto& as_stages : {whole_model_as_stages, modules_as_stages}) {
    SameBits same;  // the sums also with and without owners
    for (const bool shards : {false, true})
      run_ranks(num_ranks * num_replicas, [&](std::shared_ptr<Communicator> comm) {
        const Mesh mesh(comm, {.pipeline = GetParam().num_ranks, .data = GetParam().num_replicas});
        TiedModel model(num_stages);
        if (comm->rank() > 0) {
          const torch::NoGradGuard no_grad;
          model->wte->weight.add_(comm->rank());  // as if each rank had drawn its own
          model->table.add_(comm->rank());
        }
        DualPipe pipe(mesh,
                      {.num_micro_batches = num_micro_batches, .schedule = GetParam().kind, .shard_optimizer = shards},
                      as_stages(model));
        ShardedOptimizer optimizer(pipe, tied_adamw(pipe->owned_parameters()));
        for (int step = 0; step < kSteps; ++step) {
          optimizer.zero_grad();
          pipe->step(tied_batches(step, 2 * num_micro_batches, GetParam().num_replicas)[mesh.replica()],
                     squared_error());
          for (const auto& item : pipe->named_parameters()) {
            const std::string name = name_in_model(item.key());
            if (shards && !item.value().grad().defined()) continue;
            if (step == 0) {
              EXPECT_LE(difference(item.value().grad(), truth.gradients.at(name)), 1e-12) << item.key();
            }
            same.expect((step == 0 ? "first " : std::to_string(2 * step + shards)) + name, item.value().grad());
          }
          const double norm = pipe->clip_grad_norm_(kLargestNorm).item<double>();
          EXPECT_NEAR(norm, truth.norms[step], 1e-10 * norm);
          optimizer.step();
        }
        for (const auto& item : pipe->named_parameters()) {
          EXPECT_LE(difference(item.value(), truth.weights.at(name_in_model(item.key()))), 1e-10) << item.key();
          same.expect(std::to_string(shards) + name_in_model(item.key()), item.value());
        }
        EXPECT_TRUE(torch::equal(model->table, TiedModel(1)->table));
      });
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Tied,
                         ::testing::Values(TiedCase{"dualpipe", 2}, TiedCase{"dualpipe", 4}, TiedCase{"dualpipev", 2},
                                           TiedCase{"1f1b", 4}, TiedCase{"zb1p", 4}, TiedCase{"zbv", 2},
                                           TiedCase{"interleaved", 2}, TiedCase{"1f1b", 2, 2},
                                           TiedCase{"dualpipe", 2, 2}, TiedCase{"1f1b", 1}),
                         [](const auto& each) {
                           return "schedule_" + each.param.kind + "_" + std::to_string(each.param.num_ranks) + "_x_" +
                                  std::to_string(each.param.num_replicas);
                         });

constexpr int kTiedRanks = 2;
constexpr int kTiedMicroBatches = 4;

DualPipe tied_pipe(const std::shared_ptr<Communicator>& comm, const StageFactory& factory) {
  return DualPipe(comm, {.num_micro_batches = kTiedMicroBatches, .schedule = "1f1b"}, factory);
}

/// The text of what all ranks throw in their constructors.
std::string refused(const std::function<StageFactory()>& factory, const std::string& kind = "1f1b",
                    int num_ranks = kTiedRanks) {
  return failure_on_all(num_ranks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe(comm, {.num_micro_batches = kTiedMicroBatches, .schedule = kind}, factory());
  });
}

TEST(TiedWeights, SparseGradientsAndFrozenWeights) {
  for (const bool frozen : {false, true}) {
    const auto make = [&] {
      TiedModel model(kTiedRanks);
      model->wte->options.sparse(true);
      model->wte->weight.requires_grad_(!frozen);
      return model;
    };
    TiedModel truth = make();
    const Batch batch = token_batch(8, 5);
    tied_step(truth, {batch}, kTiedMicroBatches);
    run_ranks(kTiedRanks, [&](std::shared_ptr<Communicator> comm) {
      TiedModel model = make();
      DualPipe pipe = tied_pipe(comm, whole_model_as_stages(model));
      pipe->step(batch, squared_error());
      for (const auto& item : pipe->named_parameters())
        EXPECT_LE(difference(item.value().grad(), truth->named_parameters()[name_in_model(item.key())].grad()), 1e-12)
            << item.key();
    });
  }
}

TEST(TiedWeights, Float32GradientsOfBfloat16) {
  const auto make = [] {
    TiedModel model(kTiedRanks);
    model->to(at::kBFloat16);
    return model;
  };
  Batch batch = token_batch(8, 5);
  batch.targets[0] = batch.targets[0].to(at::kBFloat16);
  TiedModel truth = make();
  tied_step(truth, {batch}, kTiedMicroBatches);
  for (const bool shards : {false, true})
    run_ranks(kTiedRanks, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm,
                    {.num_micro_batches = kTiedMicroBatches,
                     .schedule = "1f1b",
                     .gradient_dtype = GradientDtype::float32,
                     .shard_optimizer = shards},
                    whole_model_as_stages(make()));
      pipe->step(batch, squared_error());
      for (const auto& item : pipe->named_parameters()) {
        if (shards && !item.value().grad().defined()) continue;
        EXPECT_EQ(item.value().grad().scalar_type(), at::kFloat);
        const at::Tensor expected = truth->named_parameters()[name_in_model(item.key())].grad();
        EXPECT_LE(difference(item.value().grad(), expected.to(at::kFloat)), 0.02) << item.key();
      }
    });
}

TEST(TiedWeights, WhatCannotBeTiedIsAnErrorOnAllRanks) {
  // A layer, of which stages tie a parameter under the name that `name` gives; empty: not at all.
  const auto layers = [](const std::function<std::string(int)>& name, const std::string& part = "bias") {
    return [=]() -> StageFactory {
      return [=](int number) {
        Layer module(number);
        if (number == 1) module->register_parameter("short", torch::ones({3}, f64()));
        if (number == 1) module->register_parameter("float", torch::ones({kWidth}));
        Stage stage = as_stage(module);
        if (!name(number).empty()) stage.tie(number == 1 ? part : "bias", name(number));
        return stage;
      };
    };
  };
  const auto both = [](int) -> std::string { return "shift"; };
  EXPECT_THAT(refused(layers(both, "short")), AllOf(HasSubstr("what is tied as 'shift' is of one type and size"),
                                                    HasSubstr("'bias' of stage 0 is a parameter Double [6]"),
                                                    HasSubstr("'short' of stage 1 is a parameter Double [3]")));
  EXPECT_THAT(refused(layers(both, "float")), HasSubstr("'float' of stage 1 is a parameter Float [6]"));
  EXPECT_THAT(refused(layers(both, "biass")),
              HasSubstr("rank 1: stage 1 ties 'biass', but its module has no parameter, buffer or module"));
  EXPECT_THAT(refused(layers([](int number) { return number == 0 ? "shift" : "shfit"; })),
              AllOf(HasSubstr("'bias' of stage 1 is tied as 'shfit'"), HasSubstr("no other stage")));
  EXPECT_THAT(refused(layers([](int number) { return number == 0 ? "shift" : ""; })), HasSubstr("no other stage"));
  Layer one(0);
  EXPECT_THAT(failure_on_all(2,
                             [&](std::shared_ptr<Communicator> comm) {
                               tied_pipe(comm, [&](int) { return as_stage(one).tie("weight").tie("bias"); });
                             }),
              HasSubstr("ranks 0 and 1 are threads of one process"));
  EXPECT_THAT(refused(layers(both), "dualpipe"),
              AllOf(HasSubstr("'bias' of stage 0 and 'bias' of stage 1, both tied as 'shift'"),
                    HasSubstr("two tensors"), HasSubstr("capture its module")));
  const auto twice = [](const std::string& first, const std::string& second) {
    return [=]() -> StageFactory {
      return [=](int number) {
        auto module = std::make_shared<torch::nn::Module>("Stage");
        Layer layer(number);
        module->register_module("layer", layer.ptr());
        module->register_parameter("bias", layer->bias);
        return Stage(module).tie(first, "a").tie(second, "b").compute("layer", [layer](const at::Tensor& x) mutable {
          return layer->forward(x);
        });
      };
    };
  };
  EXPECT_THAT(refused(twice("layer.bias", "bias")), HasSubstr("is tied as 'a' and as 'b', but it is one tensor"));
  EXPECT_THAT(refused(twice("layer.bias", "layer")), HasSubstr("ties 'layer.bias' twice"));
  EXPECT_THAT(message_of([] { as_stage(Layer(0)).tie("bias").tie("bias", "other"); }),
              HasSubstr("tied twice, as 'bias' and as 'other'"));
  EXPECT_THAT(message_of([] { as_stage(Layer(0)).tie(""); }), HasSubstr("Stage::tie needs the name"));
  EXPECT_THAT(failure_on_all(4,
                             [](std::shared_ptr<Communicator> comm) {
                               DualPipe(comm, {.num_micro_batches = 8}, [&](int number) {
                                 Stage stage = as_stage(Layer(number));
                                 return comm->rank() > 1 || number > 1 ? stage : stage.tie("bias");
                               });
                             }),
              HasSubstr("ranks 0 and 3 hold stage 0, but do not tie its 'bias' in the same way"));
  EXPECT_THAT(failure_on_all(4,
                             [](std::shared_ptr<Communicator> comm) {
                               const Mesh mesh(comm, {.pipeline = 2, .data = 2, .expert = 2});
                               DualPipe(
                                   mesh, {.num_micro_batches = 4, .schedule = "1f1b"},
                                   [](int number) { return as_stage(Layer(number)).tie("bias"); },
                                   [](const std::string& name) { return name.ends_with("bias"); });
                             }),
              HasSubstr("is a part of experts"));
}

TEST(UsedParts, StagesHaveTheseUnderTheirNames) {
  TiedModel model(2);
  const StageFactory factory = whole_model_as_stages(model);
  const Stage last = factory(1);
  EXPECT_THAT(last.module()->named_parameters().keys(),
              ::testing::UnorderedElementsAre("blocks.1.weight", "blocks.1.bias", "wte.weight", "scale"));
  EXPECT_THAT(last.module()->named_buffers().keys(), ::testing::ElementsAre("table"));
  EXPECT_TRUE(last.module()->named_parameters()["scale"].is_same(model->scale));
  last.module()->eval();
  EXPECT_FALSE(model->is_training()) << "code of the model itself asks it";

  const auto used = [&](const std::vector<std::string>& parts) {
    return message_of([&] { Stage(model).uses(parts); });
  };
  EXPECT_EQ(used({}), "");
  EXPECT_THAT(used({"wpe"}), HasSubstr("'wpe', but the module has no such part; it has wte, blocks, scale, table"));
  EXPECT_THAT(used({"wte", "blocks.1", "wte"}), HasSubstr("names 'wte' twice"));
  EXPECT_THAT(used({"blocks.1.bias", "blocks.1"}), HasSubstr("'blocks.1.bias', which is inside of 'blocks.1'"));
  EXPECT_THAT(message_of([&] { Stage(model).uses({"wte"}).uses({"scale"}); }), HasSubstr("called twice"));
  EXPECT_THAT(message_of([] { Stage().uses({"wte"}); }), HasSubstr("a stage without a module"));
}

TEST(UsedParts, WhatIsNotNamedTakesNoPart) {
  run_ranks(kTiedRanks, [&](std::shared_ptr<Communicator> comm) {
    TiedModel model(kTiedRanks);
    DualPipe pipe = tied_pipe(comm, whole_model_as_stages(model));
    const int other = 1 - comm->rank();
    const auto before = model->layers[other]->weight.detach().clone();
    EXPECT_EQ(pipe->parameters().size(), comm->rank() == 0 ? 3u : 4u);
    pipe->step(token_batch(8, 5), squared_error());
    EXPECT_FALSE(model->layers[other]->weight.grad().defined());
    EXPECT_TRUE(torch::equal(model->layers[other]->weight, before));
    pipe->eval();
    EXPECT_FALSE(model->is_training());
  });
}

TEST(UsedParts, OneNameOfTwoRanksHasToBeTied) {
  const auto untied = []() -> StageFactory {
    TiedModel model(kTiedRanks);
    return [model](int number) {
      return Stage(model).uses({"blocks." + std::to_string(number), "wte"}).compute("part", [](const at::Tensor& x) {
        return x;
      });
    };
  };
  EXPECT_THAT(refused(untied),
              AllOf(HasSubstr("stages 0 and 1 both use parameter 'wte.weight'"), HasSubstr("tie(\"wte.weight\")")));
}

/// `use` is what stage 1 does beside its own, of which uses() names nothing.
std::string undeclared(const std::function<at::Tensor(TiedModel&, const at::Tensor&)>& use, bool trains,
                       const std::function<at::Tensor(TiedModel&, const at::Tensor&)>& in_loss = nullptr) {
  std::string text;
  run_ranks(kTiedRanks, [&](std::shared_ptr<Communicator> comm) {
    TiedModel model(kTiedRanks);
    model->layers[0]->bias.requires_grad_(false);
    DualPipe pipe = tied_pipe(comm, [&](int number) {
      return Stage(model).uses({"blocks." + std::to_string(number)}).compute("part", [=](const at::Tensor& x) mutable {
        const at::Tensor y = model->layers[number]->forward(x);
        return number == 1 && use ? use(model, y) : y;
      });
    });
    const LossFn loss = [&](const at::Tensor& output, const at::Tensor& target) {
      return torch::mse_loss(in_loss ? in_loss(model, output) : output, target);
    };
    const Batch batch = random_batch(8, 3);
    const std::string found = message_of([&] { trains ? pipe->step(batch, loss) : pipe->evaluate(batch, loss); });
    if (comm->rank() == 1) text = found;
  });
  return text;
}

TEST(UsedParts, UsingAnotherIsAnErrorThatNamesIt) {
  const auto named = [](const std::string& name) {
    return AllOf(HasSubstr("stage 1"),
                 HasSubstr("uses '" + name + "' of its module, but Stage::uses does not name it"));
  };
  EXPECT_EQ(undeclared(nullptr, true), "");
  for (const bool trains : {true, false}) {
    SCOPED_TRACE(trains ? "step" : "evaluate");
    EXPECT_THAT(
        undeclared([](TiedModel& model, const at::Tensor& x) { return x + model->layers[0]->weight[0]; }, trains),
        named("blocks.0.weight"));
    // Frozen; in a list; without dispatch of the tensor itself; a buffer; and an operation that fails because of it.
    EXPECT_THAT(undeclared([](TiedModel& model, const at::Tensor& x) { return x + model->layers[0]->bias; }, trains),
                named("blocks.0.bias"));
    EXPECT_THAT(undeclared(
                    [](TiedModel& model, const at::Tensor& x) {
                      return x + torch::stack({model->layers[0]->bias, model->layers[0]->bias}).sum();
                    },
                    trains),
                named("blocks.0.bias"));
    EXPECT_THAT(undeclared([](TiedModel& model, const at::Tensor& x) { return x * model->scale.data().sum(); }, trains),
                named("scale"));
    EXPECT_THAT(undeclared([](TiedModel& model, const at::Tensor& x) { return x + model->table; }, trains),
                named("table"));
    EXPECT_THAT(undeclared([](TiedModel& model, const at::Tensor& x) { return x + model->scale; }, trains),
                named("scale"));
    EXPECT_THAT(undeclared(nullptr, trains, [](TiedModel& model, const at::Tensor& x) { return x + model->table; }),
                named("table"));
  }
}

}  // namespace
}  // namespace dualpipe::test
