// Each parameter has one owner, which updates it: as one process does that has all of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/train/sharded_optimizer.hpp"
#include "pipeline/network.hpp"
#include "pipeline/pipeline.hpp"
#include "pipeline/same_bits.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr double kLargestNorm = 0.05;

struct MatrixOptions : torch::optim::OptimizerCloneableOptions<MatrixOptions> {};

/// Looks at each parameter as a whole.
class MatrixOptimizer : public torch::optim::Optimizer {
 public:
  explicit MatrixOptimizer(std::vector<at::Tensor> parameters)
      : Optimizer(std::move(parameters), std::make_unique<MatrixOptions>()) {}
  at::Tensor step(LossClosure = nullptr) override {
    const at::NoGradGuard no_grad;
    for (const auto& group : param_groups())
      for (const at::Tensor& parameter : group.params()) {
        if (!parameter.grad().defined()) continue;
        const at::Tensor matrix = parameter.grad().view({parameter.size(0), -1});
        const at::Tensor update = matrix.matmul(matrix.t()).matmul(matrix) + matrix;
        parameter.sub_(update.view_as(parameter) / update.norm(), 0.01);
      }
    return {};
  }
};

/// Throws when it is told to.
class ThrowingOptimizer : public MatrixOptimizer {
 public:
  using MatrixOptimizer::MatrixOptimizer;
  at::Tensor step(LossClosure closure = nullptr) override {
    if (throws) throw std::runtime_error("no convergence");
    return MatrixOptimizer::step(std::move(closure));
  }
  bool throws = false;
};

using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<at::Tensor>)>;

std::map<std::string, MakeOptimizer> optimizers() {
  return {
      {"SGD",
       [](std::vector<at::Tensor> parameters) {
         return std::make_unique<torch::optim::SGD>(std::move(parameters), torch::optim::SGDOptions(0.5).momentum(0.9));
       }},
      {"AdamW",
       [](std::vector<at::Tensor> parameters) {
         return std::make_unique<torch::optim::AdamW>(std::move(parameters), torch::optim::AdamWOptions(0.01));
       }},
      {"matrices",
       [](std::vector<at::Tensor> parameters) { return std::make_unique<MatrixOptimizer>(std::move(parameters)); }}};
}

std::unique_ptr<torch::optim::Optimizer> sgd(std::vector<at::Tensor> parameters) {
  return std::make_unique<torch::optim::SGD>(std::move(parameters), torch::optim::SGDOptions(0.1));
}

Batch batch_of(int num_micro_batches, int step, int replica) {
  return random_batch(2 * num_micro_batches, 5000 + 100 * step + 10 * replica);
}

// --- as one process

using Weights = std::map<std::string, at::Tensor>;  // by name in the pipeline

/// One process with the batches of all replicas: the weights after each step.
std::vector<Weights> one_process(const MakeOptimizer& make, int num_stages, int num_micro_batches, int num_replicas,
                                 int num_steps) {
  std::vector<Layer> model;
  Tensors all;
  for (int s = 0; s < num_stages; ++s)
    for (const at::Tensor& parameter : model.emplace_back(s)->parameters()) all.push_back(parameter);
  const auto optimizer = make(all);
  std::vector<Weights> result;
  for (int step = 0; step < num_steps; ++step) {
    optimizer->zero_grad();
    for (int replica = 0; replica < num_replicas; ++replica)
      for (const Batch& part : split_batch(batch_of(num_micro_batches, step, replica), num_micro_batches, 0)) {
        at::Tensor x = part.inputs[0];
        for (Layer& module : model) x = module->forward(x);
        (torch::mse_loss(x, part.targets[0]) / (num_micro_batches * num_replicas)).backward();
      }
    EXPECT_GT(torch::nn::utils::clip_grad_norm_(all, kLargestNorm), kLargestNorm) << "clipping is part of the test";
    optimizer->step();
    Weights& weights = result.emplace_back();
    for (int s = 0; s < num_stages; ++s)
      for (const auto& item : model[s]->named_parameters())
        weights["stage" + std::to_string(s) + "." + item.key()] = item.value().detach().clone();
  }
  return result;
}

struct Case {
  std::string kind;
  int num_ranks;  // of a pipeline
  int num_replicas;
  Network network = Network::direct;
};

class Sharded : public ::testing::TestWithParam<Case> {};

TEST_P(Sharded, WeightsEqualOneProcessAndAllHolders) {
  const auto& [kind, num_ranks, num_replicas, network] = GetParam();
  constexpr int kSteps = 4;
  const int num_micro_batches = 2 * num_ranks;
  const int num_stages = make_schedule({kind, num_ranks, num_micro_batches}).num_stages;
  for (const auto& [name, make] : optimizers()) {
    SCOPED_TRACE(name);
    const auto truth = one_process(make, num_stages, num_micro_batches, num_replicas, kSteps);
    SameBits alike;
    run_ranks(num_ranks * num_replicas, [&, kind = kind, num_ranks = num_ranks, num_replicas = num_replicas,
                                         network = network, &make = make](std::shared_ptr<Communicator> comm) {
      const Mesh mesh(over(network, comm), {.pipeline = num_ranks, .data = num_replicas});
      DualPipe pipe(mesh, {.num_micro_batches = num_micro_batches, .schedule = kind, .shard_optimizer = true},
                    as_factory(layer));
      ShardedOptimizer optimizer(pipe, make(pipe->owned_parameters()));
      for (int step = 0; step < kSteps; ++step) {
        optimizer.zero_grad();
        pipe->step(batch_of(num_micro_batches, step, mesh.replica()), squared_error());
        pipe->clip_grad_norm_(kLargestNorm);
        const Tensors owned = pipe->owned_parameters();
        for (const auto& item : pipe->named_parameters())
          EXPECT_EQ(item.value().grad().defined(),
                    std::any_of(owned.begin(), owned.end(),
                                [&](const at::Tensor& each) { return each.is_same(item.value()); }))
              << item.key();
        optimizer.step();
        EXPECT_EQ(optimizer.steps(), step + 1);
        for (const auto& item : pipe->named_parameters()) {
          EXPECT_LE(difference(item.value(), truth[step].at(item.key())), 1e-10) << "step " << step << item.key();
          alike.expect(std::to_string(step) + item.key(), item.value());
        }
      }
    });
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const std::string& kind : schedule_kinds()) {
    for (const int num_replicas : {1, 2}) all.push_back({kind, 2, num_replicas});
    all.push_back({kind, 2, 2, Network::serial});
  }
  all.push_back({"dualpipe", 4, 3, Network::delayed});
  all.push_back({"1f1b", 1, 3});
  return all;
}

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  const std::string networks[] = {"direct", "serial", "delayed"};
  const Case& each = info.param;
  return "schedule_" + each.kind + "_" + std::to_string(each.num_ranks) + "_x_" + std::to_string(each.num_replicas) +
         "_" + networks[static_cast<int>(each.network)];
}

INSTANTIATE_TEST_SUITE_P(Kinds, Sharded, ::testing::ValuesIn(cases()), name_of);

// --- who owns what

/// A layer with some more parameters, whose forward uses them.
struct ManyImpl : torch::nn::Module {
  explicit ManyImpl(int number) : layer(register_module("layer", Layer(number))) {
    for (const int size : {50, 3, 20, 20, 7, 1})
      extra.push_back(register_parameter("extra" + std::to_string(extra.size()), torch::full({size}, 0.1, f64())));
    for (const int size : {40, 30})
      register_parameter("frozen" + std::to_string(size), torch::full({size}, 0.1, f64()), /*requires_grad=*/false);
    single = register_parameter("single", torch::full({5}, 0.1f));
  }
  at::Tensor forward(const at::Tensor& x) {
    at::Tensor y = layer->forward(x) + single.sum();
    for (const at::Tensor& each : extra) y = y + each.square().sum();
    return y;
  }
  Layer layer;
  Tensors extra;
  at::Tensor single;
};

Piece many(int stage) {
  auto module = std::make_shared<ManyImpl>(stage);
  return {module, [module](const Tensors& x) { return Tensors{module->forward(x[0])}; }};
}

TEST(ShardedOwners, EachParameterHasOneAndTheBytesAreSpread) {
  for (const std::string kind : {"dualpipe", "dualpipev"}) {
    std::mutex mutex;
    std::map<std::string, int> owners;                                        // by place in the pipeline and name
    std::map<int, std::map<int, std::pair<std::size_t, std::size_t>>> bytes;  // by place and rank: trained, frozen
    run_ranks(4, [&](std::shared_ptr<Communicator> world) {
      const Mesh mesh(world, {.pipeline = 2, .data = 2});
      DualPipe pipe(mesh, {.num_micro_batches = 4, .schedule = kind, .shard_optimizer = true}, as_factory(many));
      const int group = kind == "dualpipe" ? 0 : mesh.pipeline()->rank();  // ranks that hold the same
      const Tensors owned = pipe->owned_parameters();
      const std::lock_guard lock(mutex);
      auto& mine = bytes[group][world->rank()];
      for (const auto& item : pipe->named_parameters())
        for (const at::Tensor& each : owned)
          if (each.is_same(item.value())) {
            ++owners[item.key()];
            (each.requires_grad() ? mine.first : mine.second) += each.nbytes();
          }
    });
    const int num_stages = kind == "dualpipe" ? 2 : 4;
    EXPECT_EQ(owners.size(), num_stages * many(0).module->parameters().size());
    for (const auto& [name, count] : owners) EXPECT_EQ(count, 1) << name;
    for (const auto& [group, of_ranks] : bytes) {
      const auto [least, most] =
          std::minmax_element(of_ranks.begin(), of_ranks.end(),
                              [](const auto& a, const auto& b) { return a.second.first < b.second.first; });
      EXPECT_LE(most->second.first - least->second.first, 50 * 8U) << "of trained parameters the largest has 400 bytes";
      for (const auto& [rank, of_rank] : of_ranks)
        EXPECT_EQ(of_rank.second > 0, kind == "dualpipe" || of_ranks.size() == 2) << "frozen ones on rank " << rank;
    }
  }
}

TEST(ShardedOwners, WithoutTheOptionEachRankOwnsAll) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 4}, as_factory(layer));
    const Tensors owned = pipe->owned_parameters(), all = pipe->parameters();
    ASSERT_EQ(owned.size(), all.size());
    for (std::size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(owned[i].is_same(all[i]));
    // The same program is right.
    ShardedOptimizer optimizer(pipe, sgd(owned));
    pipe->step(batch_of(4, 0, 0), squared_error());
    Tensors expected;
    for (const at::Tensor& each : all) expected.push_back(each.detach() - 0.1 * each.grad());
    optimizer.step();
    for (std::size_t i = 0; i < all.size(); ++i) EXPECT_LE(difference(all[i], expected[i]), 1e-14);
  });
}

// --- gradients

TEST(ShardedGradients, HaveTheBitsOfThoseThatAllHaveAndAddUp) {
  for (const bool experts : {false, true}) {
    SCOPED_TRACE(experts ? "with experts" : "");
    run_ranks(8, [&](std::shared_ptr<Communicator> world) {
      const Mesh mesh(world, {.pipeline = 2, .data = 4, .expert = experts ? 2 : 1});
      IsExpert is_expert;
      if (experts) is_expert = [](const std::string& name) { return name.find("extra") != std::string::npos; };
      const auto make = [&](bool shard) {
        return DualPipe(mesh, {.num_micro_batches = 4, .shard_optimizer = shard}, as_factory(many), is_expert);
      };
      DualPipe whole = make(false), sharded = make(true);
      std::vector<at::Tensor> known;
      for (int step = 0; step < 2; ++step) {
        for (DualPipe* pipe : {&whole, &sharded}) (*pipe)->step(batch_of(4, step, mesh.replica()), squared_error());
        for (const auto& item : sharded->named_parameters())
          if (item.value().grad().defined()) {
            EXPECT_TRUE(torch::equal(item.value().grad(), whole->named_parameters()[item.key()].grad())) << item.key();
            if (step == 0) known.push_back(item.value().grad());
          }
        for (const at::Tensor& parameter : sharded->parameters())  // one that does not count
          if (step == 0 && parameter.requires_grad() && !parameter.grad().defined())
            parameter.mutable_grad() = torch::ones_like(parameter);
      }
      Tensors now;
      for (const at::Tensor& parameter : sharded->parameters())
        if (parameter.grad().defined()) now.push_back(parameter.grad());
      ASSERT_EQ(now.size(), known.size()) << "those of others are gone";
      for (std::size_t i = 0; i < now.size(); ++i) EXPECT_TRUE(now[i].is_same(known[i]));
      EXPECT_NEAR(sharded->clip_grad_norm_(1e9).item<double>(), whole->clip_grad_norm_(1e9).item<double>(), 1e-12);

      ShardedOptimizer first(whole, sgd(whole->owned_parameters())), second(sharded, sgd(sharded->owned_parameters()));
      first.step();
      second.step();
      for (const auto& item : sharded->named_parameters())
        EXPECT_TRUE(torch::equal(item.value(), whole->named_parameters()[item.key()])) << item.key();
    });
  }
}

TEST(ShardedGradients, AFailedStepGivesThemBack) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    bool fails = false;
    DualPipe pipe(comm, {.num_micro_batches = 4, .shard_optimizer = true}, [&](int stage) {
      Layer module(stage);
      return Stage(module).compute("layer", [&, module](const at::Tensor& x) mutable {
        if (fails && comm->rank() == 1) throw std::runtime_error("out of order");
        return module->forward(x);
      });
    });
    pipe->step(batch_of(4, 0, 0), squared_error());
    Tensors before;
    for (const at::Tensor& parameter : pipe->parameters())
      before.push_back(parameter.grad().defined() ? parameter.grad().clone() : at::Tensor());
    comm->commit("");  // nobody is in the step before
    fails = true;
    EXPECT_THAT(message_of([&] { pipe->step(batch_of(4, 1, 0), squared_error()); }), HasSubstr("out of order"));
    std::size_t i = 0;
    for (const at::Tensor& parameter : pipe->parameters())
      EXPECT_LE(difference(parameter.grad(), before[i++]), 0) << "undefined equals undefined only";
  });
}

// --- what cannot be

TEST(ShardedErrors, OfTheCallerAreOnAllRanksAndThePipelineGoesOn) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 4, .shard_optimizer = true}, as_factory(layer));
    const auto refused = [&](std::unique_ptr<torch::optim::Optimizer> optimizer) {
      return message_of([&] { ShardedOptimizer(pipe, std::move(optimizer)); });
    };
    EXPECT_THAT(refused(comm->rank() == 0 ? sgd(pipe->owned_parameters()) : nullptr),
                HasSubstr("rank 1: ShardedOptimizer needs an optimizer"));
    EXPECT_THAT(refused(std::make_unique<torch::optim::LBFGS>(pipe->owned_parameters())),
                HasSubstr("L-BFGS looks at all parameters"));
    EXPECT_THAT(refused(sgd(pipe->parameters())),
                HasSubstr("which another rank owns; make it from owned_parameters()"));
    EXPECT_THAT(refused(sgd({torch::ones({3}, torch::requires_grad())})),
                HasSubstr("of sizes [3] that is none of the pipeline's"));

    ShardedOptimizer optimizer(pipe, sgd(pipe->owned_parameters()));
    pipe->step(batch_of(4, 0, 0), squared_error());
    if (comm->rank() == 1) optimizer.optimizer().param_groups()[0].params().push_back(torch::ones({4}));
    EXPECT_THAT(message_of([&] { optimizer.step(); }), HasSubstr("rank 1: the optimizer has a parameter of sizes [4]"));
    EXPECT_EQ(optimizer.steps(), 0);
    if (comm->rank() == 1) optimizer.optimizer().param_groups()[0].params().pop_back();
    if (comm->rank() == 1) pipe->parameters()[0].requires_grad_(false);
    EXPECT_THAT(message_of([&] { optimizer.step(); }), HasSubstr("other parameters of them require grad"));
    if (comm->rank() == 1) pipe->parameters()[0].requires_grad_(true);
    optimizer.step();
    EXPECT_EQ(optimizer.steps(), 1);
  });
}

TEST(ShardedErrors, RanksThatWouldNotAgreeOnOwners) {
  EXPECT_THAT(failure_on_all(2,
                             [](std::shared_ptr<Communicator> comm) {
                               DualPipe(comm, {.num_micro_batches = 4, .shard_optimizer = comm->rank() == 1},
                                        as_factory(layer));
                             }),
              HasSubstr("ranks disagree about the options"));
  EXPECT_THAT(failure_on_all(2,
                             [](std::shared_ptr<Communicator> comm) {
                               DualPipe(comm, {.num_micro_batches = 4, .shard_optimizer = true}, [&](int stage) {
                                 Layer module(stage);
                                 module->bias.requires_grad_(comm->rank() == 0);
                                 return module;
                               });
                             }),
              HasSubstr("ranks 0 and 1 hold the same stages, but these have other parameters there"));
}

TEST(ShardedErrors, ACopyThatNoShardedOptimizerUpdatesIsFound) {
  EXPECT_THAT(failure_on_all(2,
                             [](std::shared_ptr<Communicator> comm) {
                               DualPipe pipe(
                                   comm, {.num_micro_batches = 4, .compare_replicas_every = 1, .shard_optimizer = true},
                                   as_factory(layer));
                               const auto optimizer = sgd(pipe->parameters());
                               for (int step = 0; step < 2; ++step) {
                                 pipe->step(batch_of(4, step, 0), squared_error());
                                 optimizer->step();
                               }
                             }),
              HasSubstr("the optimizer is no ShardedOptimizer"));
}

TEST(ShardedErrors, AnOptimizerThatThrowsIsNamedOnAllRanks) {
  run_ranks(4, [](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.pipeline = 2, .data = 2});
    DualPipe pipe(mesh, {.num_micro_batches = 4, .shard_optimizer = true}, as_factory(layer));
    auto own = std::make_unique<ThrowingOptimizer>(pipe->owned_parameters());
    ThrowingOptimizer& inner = *own;
    ShardedOptimizer optimizer(pipe, std::move(own));
    const auto step = [&] {
      optimizer.zero_grad();
      pipe->step(batch_of(4, 0, mesh.replica()), squared_error());
      optimizer.step();
    };
    step();
    step();
    inner.throws = world->rank() == 2;
    const std::string text = message_of(step);
    EXPECT_THAT(text, AllOf(HasSubstr("rank 2"), HasSubstr("no convergence"),
                            HasSubstr("of step 3, so parameters may be mixed"),
                            HasSubstr("All ranks have 2 whole steps"), HasSubstr("go on from the last checkpoint")));
    EXPECT_EQ(optimizer.steps(), 2);
    EXPECT_THAT(message_of([&] { optimizer.step(); }),
                AllOf(HasSubstr("an earlier step failed"), HasSubstr("no convergence")));
  });
}

TEST(ShardedErrors, AnotherCallAtTheSameTime) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 4, .shard_optimizer = true}, as_factory(layer));
    ShardedOptimizer optimizer(pipe, sgd(pipe->owned_parameters()));
    EXPECT_THAT(message_of([&] {
                  if (comm->rank() == 0)
                    optimizer.step();
                  else
                    pipe->clip_grad_norm_(1);
                }),
                HasSubstr("rank 0 calls ShardedOptimizer::step(), rank 1 calls clip_grad_norm_()"));
  });
}

// --- masters

TEST(ShardedMasters, KeepWhatTheirParametersRoundAway) {
  constexpr int kSteps = 60;
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const auto train = [&](bool masters) {
      double value = 0;
      run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
        DualPipe pipe(comm, {.num_micro_batches = 2, .shard_optimizer = true}, [&](int) {
          auto module = std::make_shared<torch::nn::Module>("scale");
          const at::Tensor scale = module->register_parameter("scale", torch::ones({2}, dtype));
          return Stage(module).compute("scale", [=](const at::Tensor& x) { return x * scale; });
        });
        ShardedOptimizer optimizer(
            pipe,
            std::make_unique<torch::optim::SGD>(pipe->owned_parameters(), torch::optim::SGDOptions(1e-4).momentum(0.5)),
            {.master_weights = masters});
        const Batch batch{.inputs = {torch::ones({2, 2}, dtype)}, .targets = {torch::zeros({2, 2}, dtype)}};
        const auto sum = [](const Tensors& outputs, const Tensors&) { return outputs[0].sum(); };
        for (int step = 0; step < kSteps; ++step) {
          optimizer.zero_grad();
          pipe->step(batch, sum);
          optimizer.step();
        }
        EXPECT_EQ(pipe->parameters()[0].scalar_type(), dtype);
        for (const auto& [parameter, state] : optimizer.optimizer().state()) {
          const auto& momentum = static_cast<const torch::optim::SGDParamState&>(*state).momentum_buffer();
          EXPECT_EQ(momentum.scalar_type(), masters ? at::kFloat : dtype);
          bool of_parameter = false;
          for (const at::Tensor& owned : pipe->owned_parameters())
            of_parameter = of_parameter || owned.unsafeGetTensorImpl() == parameter;
          EXPECT_TRUE(of_parameter) << "states are those of parameters, as checkpoints want them";
        }
        if (comm->rank() == 0) value = pipe->parameters()[0][0].item<double>();
        if (!masters) return;
        // A parameter that was loaded is where it goes on from.
        {
          const at::NoGradGuard no_grad;
          for (const at::Tensor& parameter : pipe->parameters()) parameter.fill_(3);
        }
        for (auto& group : optimizer.optimizer().param_groups()) group.options().set_lr(0);
        optimizer.step();
        for (const at::Tensor& parameter : pipe->parameters()) EXPECT_TRUE(parameter.eq(3).all().item<bool>());
      });
      return value;
    };
    EXPECT_EQ(train(false), 1) << "each step is too small for the type";
    EXPECT_NEAR(train(true), 1 - 1e-4 * 2 * kSteps, 0.004);
  }
}

}  // namespace
}  // namespace dualpipe::test
