// Replicas of a pipeline train one model: as one process does with all batches together.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "pipeline/network.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kSteps = 4;
constexpr double kLargestNorm = 0.05;

Batch batch_of(int num_micro_batches, int step, int replica) {
  return random_batch(2 * num_micro_batches, 1000 + 100 * step + 10 * replica);
}

/// Several steps of one process with the batches of all replicas.
struct Truth {
  std::vector<std::vector<double>> losses;                 // by step: of all micro-batches, replica after replica
  std::vector<double> norms;                               // by step: before clipping
  std::vector<std::map<std::string, at::Tensor>> weights;  // by stage, at the end
};

Truth one_process(int num_stages, int num_micro_batches, int num_replicas) {
  std::vector<Layer> model;
  Tensors all;
  for (int s = 0; s < num_stages; ++s)
    for (const at::Tensor& parameter : model.emplace_back(s)->parameters()) all.push_back(parameter);
  torch::optim::AdamW optimizer(all, torch::optim::AdamWOptions(0.01));
  Truth truth;
  for (int step = 0; step < kSteps; ++step) {
    optimizer.zero_grad();
    std::vector<double>& losses = truth.losses.emplace_back();
    for (int replica = 0; replica < num_replicas; ++replica)
      for (const Batch& part : split_batch(batch_of(num_micro_batches, step, replica), num_micro_batches, 0)) {
        at::Tensor x = part.inputs[0];
        for (Layer& module : model) x = module->forward(x);
        const at::Tensor loss = torch::mse_loss(x, part.targets[0]);
        losses.push_back(loss.item<double>());
        (loss / (num_micro_batches * num_replicas)).backward();
      }
    truth.norms.push_back(torch::nn::utils::clip_grad_norm_(all, kLargestNorm));
    optimizer.step();
  }
  for (Layer& module : model) {
    auto& weights = truth.weights.emplace_back();
    for (const auto& item : module->named_parameters()) weights[item.key()] = item.value().detach();
  }
  return truth;
}

/// Expects the same bits on all ranks of the data group.
void expect_alike(Communicator& data, const Tensors& tensors) {
  for (const at::Tensor& tensor : tensors) {
    const Tensors all = data.all_gather(tensor.detach()).take();
    for (const at::Tensor& each : all) EXPECT_TRUE(torch::equal(each, all[0]));
  }
}

struct Case {
  std::string kind;
  int num_ranks;  // of a pipeline
  int num_replicas;
  Network network = Network::direct;
  MeshOrder order = MeshOrder::data_fastest;
};

class DataParallel : public ::testing::TestWithParam<Case> {};

TEST_P(DataParallel, WeightsAfterSeveralStepsEqualOneProcess) {
  const auto& [kind, num_ranks, num_replicas, network, order] = GetParam();
  const int num_micro_batches = 2 * num_ranks;
  const int num_stages = make_schedule({kind, num_ranks, num_micro_batches}).num_stages;
  const Truth truth = one_process(num_stages, num_micro_batches, num_replicas);
  run_ranks(num_ranks * num_replicas, [&, kind = kind, num_ranks = num_ranks, num_replicas = num_replicas,
                                       network = network, order = order](std::shared_ptr<Communicator> comm) {
    const Mesh mesh(over(network, comm), {.pipeline = num_ranks, .data = num_replicas, .order = order});
    DualPipe pipe(mesh, {.num_micro_batches = num_micro_batches, .schedule = kind}, as_factory(layer));
    torch::optim::AdamW optimizer(pipe->parameters(), torch::optim::AdamWOptions(0.01));
    for (int step = 0; step < kSteps; ++step) {
      optimizer.zero_grad();
      const StepResult result = pipe->step(batch_of(num_micro_batches, step, mesh.replica()), squared_error());
      const std::vector<double> losses = result.micro_batch_losses();
      ASSERT_EQ(losses.size(), truth.losses[step].size());
      double mean = 0;
      for (std::size_t m = 0; m < losses.size(); ++m) {
        EXPECT_NEAR(losses[m], truth.losses[step][m], 1e-10) << "step " << step << ", micro-batch " << m;
        mean += losses[m] / static_cast<double>(losses.size());
      }
      EXPECT_NEAR(result.loss.item<double>(), mean, 1e-12);
      const double norm = pipe->clip_grad_norm_(kLargestNorm).item<double>();
      EXPECT_NEAR(norm, truth.norms[step], 1e-10 * norm);
      EXPECT_GT(norm, kLargestNorm) << "clipping is part of the test";
      optimizer.step();
      Tensors tensors = pipe->parameters();
      for (const at::Tensor& parameter : pipe->parameters()) tensors.push_back(parameter.grad());
      expect_alike(*mesh.data(), tensors);
    }
    for (const int stage : pipe->local_stages())
      for (const auto& item : pipe->named_children()["stage" + std::to_string(stage)]->named_parameters())
        EXPECT_LE(difference(item.value(), truth.weights[stage].at(item.key())), 1e-10) << stage << item.key();
  });
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const std::string& kind : schedule_kinds()) {
    for (const int num_replicas : {1, 2}) all.push_back({kind, 2, num_replicas});
    all.push_back({kind, 2, 2, Network::serial});
    all.push_back({kind, 2, 2, Network::delayed});
    all.push_back({kind, 2, 2, Network::direct, MeshOrder::pipeline_fastest});
    all.push_back({kind, 4, 2, Network::serial});
  }
  all.push_back({"1f1b", 1, 3});
  all.push_back({"dualpipe", 4, 3});
  return all;
}

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  const std::string networks[] = {"direct", "serial", "delayed"};
  const Case& each = info.param;
  return "schedule_" + each.kind + "_" + std::to_string(each.num_ranks) + "_x_" + std::to_string(each.num_replicas) +
         "_" + networks[static_cast<int>(each.network)] +
         (each.order == MeshOrder::data_fastest ? "" : "_pipelines_are_neighbours");
}

INSTANTIATE_TEST_SUITE_P(Replicas, DataParallel, ::testing::ValuesIn(cases()), name_of);

// --- what the replicas share

TEST(DataParallelStart, WeightsOfTheFirstReplicaReplaceTheOthers) {
  run_ranks(4, [](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.pipeline = 2, .data = 2});
    DualPipe pipe(mesh, {.num_micro_batches = 4}, [&](int stage) {
      Layer module(stage);
      module->weight.data().add_(world->rank());  // as if each rank had seeded for itself
      return module;
    });
    for (const int stage : pipe->local_stages())  // each is held by ranks 0 to 3
      EXPECT_TRUE(
          torch::equal(pipe->named_parameters()["stage" + std::to_string(stage) + ".weight"], Layer(stage)->weight));
  });
}

TEST(DataParallelStart, WhatDiffersBetweenReplicasIsAnErrorOnAllRanks) {
  const auto failure = [](const std::function<void(const Mesh&)>& body) {
    return failure_on_all(4, [&](std::shared_ptr<Communicator> world) {
      const Mesh mesh(world, {.pipeline = 2, .data = 2});
      body(mesh);
    });
  };
  EXPECT_THAT(failure([](const Mesh& mesh) {
                DualPipe(mesh, {.num_micro_batches = 4 + 2 * mesh.replica()}, as_factory(layer));
              }),
              HasSubstr("ranks disagree about the options"));
  EXPECT_THAT(failure([](const Mesh& mesh) {
                DualPipe(mesh, {.num_micro_batches = 4}, [&](int stage) {
                  if (mesh.replica() == 1) throw std::runtime_error("no memory");
                  return Layer(stage);
                });
              }),
              HasSubstr("no memory"));
  EXPECT_THAT(
      failure([](const Mesh& mesh) { DualPipe(mesh, {.num_micro_batches = 4, .num_ranks = 4}, as_factory(layer)); }),
      HasSubstr("num_ranks is 4"));
  EXPECT_THAT(failure_on_all(2,
                             [](std::shared_ptr<Communicator> world) {
                               const Mesh mesh(world, {.data = 2, .expert = 2});
                               DualPipe(mesh, {.num_micro_batches = 4, .schedule = "1f1b"}, as_factory(layer));
                             }),
              HasSubstr("expert groups of 2 ranks, but nothing says which parameters are theirs"));
}

TEST(DataParallelStep, FrozenParametersOfAnyTypeTakeNoPart) {
  struct FrozenImpl : torch::nn::Module {
    explicit FrozenImpl(int number) : layer(register_module("layer", Layer(number))) {
      table = register_parameter("table", torch::arange(kWidth), /*requires_grad=*/false);
      half = register_parameter("half", torch::ones({2}, torch::kHalf), false);
      layer->bias.requires_grad_(false);
    }
    at::Tensor forward(const at::Tensor& x) { return layer->forward(x).index_select(1, table); }
    Layer layer;
    at::Tensor table, half;
  };
  const int num_micro_batches = 4;
  run_ranks(4, [&](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.pipeline = 2, .data = 2});
    DualPipe pipe(mesh, {.num_micro_batches = num_micro_batches},
                  [](int stage) { return as_stage(std::make_shared<FrozenImpl>(stage)); });
    pipe->step(batch_of(num_micro_batches, 0, mesh.replica()), squared_error());
    at::Tensor sum;
    for (const int replica : {0, 1}) {
      const Reference one = reference(layer, 2, batch_of(num_micro_batches, 0, replica), num_micro_batches,
                                      squared_error(), 1.0 / (2 * num_micro_batches));
      const at::Tensor& gradient = one.gradients.at(1).at("weight");
      sum = sum.defined() ? sum + gradient : gradient;
    }
    for (const auto& item : pipe->named_parameters()) {
      if (item.key() == "stage1.layer.weight") {
        EXPECT_LE(difference(item.value().grad(), sum), 1e-12);
      }
      EXPECT_EQ(item.value().grad().defined(), item.key().ends_with("weight")) << item.key();
    }
  });
}

TEST(DataParallelStep, AFailureInOneReplicaRollsBackAll) {
  for (const bool late : {false, true}) {
    SCOPED_TRACE(late ? "behind the last backward" : "in a forward");
    run_ranks(4, [&](std::shared_ptr<Communicator> world) {
      const Mesh mesh(world, {.pipeline = 2, .data = 2});
      int step = 0, calls = 0;
      DualPipe pipe(mesh, {.num_micro_batches = 4}, [&](int stage) {
        Layer module(stage);
        return Stage(module).compute("layer", [&, module](const at::Tensor& x) mutable {
          if (!late && step == 1 && world->rank() == 3 && ++calls == 2) throw std::runtime_error("out of order");
          return module->forward(x);
        });
      });
      struct Failing : Observer {
        void begin(std::int64_t number) override { now = number; }
        void record(const Interval& interval) override {
          if (now == 1 && interval.step.op.pass != Pass::Forward && interval.lane == Lane::compute) ++backwards;
          if (backwards == 4) throw std::runtime_error("out of order");  // the last step of the rank
        }
        void end(bool) override {}
        std::int64_t now = 0;
        int backwards = 0;
      };
      if (late && world->rank() == 3) pipe->add_observer(std::make_shared<Failing>());
      pipe->step(batch_of(4, 0, mesh.replica()), squared_error());
      Tensors before;
      for (const at::Tensor& parameter : pipe->parameters()) before.push_back(parameter.grad().clone());
      step = 1;
      world->commit("");  // nobody is in the step before
      const std::string text = message_of([&] { pipe->step(batch_of(4, 1, mesh.replica()), squared_error()); });
      EXPECT_THAT(text, HasSubstr("out of order"));
      if (world->rank() != 3) {
        EXPECT_THAT(text, HasSubstr("rank 3"));
      }
      std::size_t i = 0;
      for (const at::Tensor& parameter : pipe->parameters()) EXPECT_TRUE(torch::equal(parameter.grad(), before[i++]));
      EXPECT_THAT(message_of([&] { pipe->step(batch_of(4, 1, mesh.replica()), squared_error()); }),
                  HasSubstr("an earlier step failed"));
    });
  }
}

TEST(DataParallelStep, BatchesAreComparedWithinAReplica) {
  std::mutex mutex;
  std::set<std::string> texts;
  run_ranks(4, [&](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.pipeline = 2, .data = 2});  // replica 1: ranks 1 and 3
    DualPipe pipe(mesh, {.num_micro_batches = 4}, as_factory(layer));
    const std::string text =
        message_of([&] { pipe->step(batch_of(4, world->rank() == 3 ? 7 : 0, mesh.replica()), squared_error()); });
    {
      const std::lock_guard lock(mutex);
      texts.insert(text);
    }
    pipe->step(batch_of(4, 0, mesh.replica()), squared_error());  // it goes on
    const Batch pieces = Batch::from_micro_batches(split_batch(batch_of(4, 0, 0), 4 - mesh.replica() * 2, 0));
    EXPECT_THAT(message_of([&] { pipe->evaluate(pieces, squared_error()); }),
                HasSubstr("that of rank 0 has 4 micro-batches, that of rank 1 has 2"));
    EXPECT_THAT(message_of([&] { pipe->step(mesh.replica() == 0 ? batch_of(4, 0, 0) : Batch{}, squared_error()); }),
                HasSubstr("rank 1 got an empty batch"));
  });
  ASSERT_EQ(texts.size(), 1u) << ::testing::PrintToString(texts);
  EXPECT_THAT(
      *texts.begin(),
      HasSubstr("Batch::inputs of rank 3 has other sizes or values, or others that require grad, than that of rank 1"));
}

TEST(DataParallelStep, ReplicasThatDriftAreAnError) {
  run_ranks(4, [](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.pipeline = 2, .data = 2});
    DualPipe pipe(mesh, {.num_micro_batches = 4, .schedule = "1f1b"}, as_factory(layer));
    if (world->rank() == 3) pipe->parameters()[0].data().add_(1);
    const auto step = [&] { pipe->step(batch_of(4, 0, mesh.replica()), squared_error()); };
    EXPECT_THAT(message_of(step), HasSubstr("parameter 'weight' of stage 1 on ranks 2 and 3"));
    pipe->broadcast_parameters();
    step();
    if (world->rank() == 1) pipe->parameters()[0].requires_grad_(false);
    EXPECT_THAT(message_of(step), HasSubstr("other parameters of them require grad"));
  });
}

TEST(DataParallelStep, AParameterThatIsUsedInOneReplicaOnly) {
  run_ranks(2, [](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.data = 2});
    DualPipe pipe(mesh, {.num_micro_batches = 2, .schedule = "1f1b"}, [&](int) {
      auto module = std::make_shared<torch::nn::Module>("two");
      const at::Tensor a = module->register_parameter("a", torch::ones({kWidth}, f64()));
      const at::Tensor b = module->register_parameter("b", torch::ones({kWidth}, f64()));
      module->register_parameter("unused", torch::ones({kWidth}, f64()));
      const bool first = mesh.replica() == 0;
      return Stage(module).compute("two", [=](const at::Tensor& x) { return first ? x * a : x * b; });
    });
    pipe->step(batch_of(2, 0, 0), squared_error());
    const auto parameters = pipe->named_parameters();
    EXPECT_TRUE(torch::equal(parameters["stage0.a"].grad(), parameters["stage0.b"].grad()));
    EXPECT_FALSE(parameters["stage0.unused"].grad().defined());
  });
}

TEST(DataParallelStep, EvaluateAndPredictTakeABatchOfEachReplica) {
  run_ranks(4, [](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.pipeline = 2, .data = 2});
    DualPipe pipe(mesh, {.num_micro_batches = 4}, as_factory(layer));
    std::vector<double> losses;
    Tensors outputs;
    for (const int replica : {0, 1}) {
      const Reference one = reference(layer, 2, batch_of(4, 0, replica), 4, squared_error(), 1);
      losses.insert(losses.end(), one.losses.begin(), one.losses.end());
      if (replica != mesh.replica()) continue;
      for (const Tensors& output : one.outputs) outputs.push_back(output[0]);
    }
    const Batch batch = batch_of(4, 0, mesh.replica());
    EXPECT_EQ(pipe->evaluate(batch, squared_error()).micro_batch_losses(), losses);
    const Tensors predicted = pipe->predict({.inputs = batch.inputs});
    ASSERT_EQ(predicted.size(), 1u);
    EXPECT_TRUE(torch::equal(predicted[0], torch::cat(outputs)));
  });
}

// --- when gradients are summed

/// How many steps each rank runs behind the sum of each of its stages.
std::map<int, int> steps_behind_sums(const Program& program, int place) {
  std::map<int, int> result;
  const auto& instructions = program.ranks[place];
  for (auto at = instructions.begin(); at != instructions.end(); ++at)
    if (at->what == Instruction::Do::reduce)
      result[program.reductions[at->transfer].stage] = static_cast<int>(std::count_if(
          at, instructions.end(), [](const Instruction& each) { return each.what == Instruction::Do::compute; }));
  return result;
}

TEST(DataParallelSums, RunInTheirPlacesUnderTheRestOfTheStep) {
  for (const std::string& kind : schedule_kinds())
    for (const int num_replicas : {1, 2}) {
      SCOPED_TRACE(kind + ", replicas: " + std::to_string(num_replicas));
      const int num_ranks = 4, num_micro_batches = 8;
      const Program program =
          lower(make_schedule({kind, num_ranks, num_micro_batches}), Publish::early, {}, num_replicas);
      run_ranks(num_ranks * num_replicas, [&](std::shared_ptr<Communicator> comm) {
        // Each operation is over before the next one begins, so a trace shows their order.
        const Mesh mesh(over(Network::serial, comm), {.pipeline = num_ranks, .data = num_replicas});
        DualPipe pipe(mesh, {.num_micro_batches = num_micro_batches, .schedule = kind}, as_factory(layer));
        const auto tracer = std::make_shared<Tracer>(comm->rank());
        pipe->add_observer(tracer);
        for (int step = 0; step < 2; ++step)
          pipe->step(batch_of(num_micro_batches, step, mesh.replica()), squared_error());
        const std::vector<Interval> intervals = tracer->last().intervals;
        std::map<int, int> seen;
        for (const Interval& sum : intervals) {
          if (sum.lane != Lane::reduction) continue;
          EXPECT_EQ(sum.step.op.pass, Pass::BackwardWeight);
          EXPECT_EQ(seen.count(sum.step.op.stage), 0u);
          seen[sum.step.op.stage] =
              static_cast<int>(std::count_if(intervals.begin(), intervals.end(), [&](const Interval& each) {
                return each.lane == Lane::compute && each.begin >= sum.end;
              }));
          for (const Interval& each : intervals)
            EXPECT_TRUE(each.lane != Lane::compute || each.begin >= sum.end || each.end <= sum.begin);
        }
        EXPECT_EQ(seen, steps_behind_sums(program, mesh.pipeline()->rank()));
      });
    }
}

/// Stages 0 and 3 use one weight, which is complete only when both are.
TEST(DataParallelSums, OfAParameterThatTwoStagesShareComeWithTheLastOfThem) {
  for (const std::string kind : {"dualpipe", "dualpipev", "zbv"}) {
    const int num_stages = make_schedule({kind, kRanks, kMicroBatches}).num_stages;
    std::vector<Layer> model;
    for (int s = 0; s < num_stages; ++s) model.push_back(s + 1 == num_stages ? model[0] : Layer(s));
    for (const int replica : {0, 1})
      for (const Batch& part : split_batch(batch_of(kMicroBatches, 0, replica), kMicroBatches, 0)) {
        at::Tensor x = part.inputs[0];
        for (Layer& module : model) x = module->forward(x);
        (torch::mse_loss(x, part.targets[0]) / (2 * kMicroBatches)).backward();
      }
    run_ranks(2 * kRanks, [&](std::shared_ptr<Communicator> world) {
      const Mesh mesh(world, {.pipeline = kRanks, .data = 2});
      const Layer first(0);
      DualPipe pipe(mesh, {.num_micro_batches = kMicroBatches, .schedule = kind},
                    [&](int stage) { return stage == 0 || stage + 1 == num_stages ? first : Layer(stage); });
      pipe->step(batch_of(kMicroBatches, 0, mesh.replica()), squared_error());
      for (const auto& child : pipe->named_children()) {
        const Layer& truth = model[std::stoi(child.key().substr(5))];
        for (const auto& item : child.value()->named_parameters())
          EXPECT_LE(difference(item.value().grad(), truth->named_parameters()[item.key()].grad()), 1e-12)
              << kind << child.key() << item.key();
      }
    });
  }
}

TEST(DataParallelSums, AParameterOfAnotherStageThatIsNotRegisteredIsAnError) {
  const auto step = [&](int owner, int user) {
    std::vector<std::string> texts(kRanks);
    run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
      const Layer shared(owner);
      DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, [&](int stage) {
        Layer module = stage == owner ? shared : Layer(stage);
        return Stage(module).compute("layer", [=](const at::Tensor& x) mutable {
          const at::Tensor y = module->forward(x);
          return stage == user ? y.matmul(shared->weight.t()) : y;
        });
      });
      texts[comm->rank()] = message_of([&] { pipe->step(batch_of(kMicroBatches, 0, 0), squared_error()); });
    });
    return texts[0];
  };
  // Stage 3 is complete before stage 0.
  EXPECT_THAT(step(3, 0), AllOf(HasSubstr("stage 0, its loss included, uses a parameter of sizes [6, 6]"),
                                HasSubstr("Register it with the module of each stage")));
  EXPECT_EQ(step(0, 3), "");
}

// --- parameters of experts

/// A layer that every rank has, and one of which each rank of an expert group has its own.
struct PartImpl : torch::nn::Module {
  PartImpl(int stage, int part)
      : shared(register_module("shared", Layer(stage))), own(register_module("own", Layer(100 + 10 * stage + part))) {
    own->register_buffer("part", torch::full({}, part, torch::kInt64));
  }
  at::Tensor forward(const at::Tensor& x) { return own->forward(shared->forward(x)); }
  Layer shared, own;
};
TORCH_MODULE(Part);

class Experts : public ::testing::TestWithParam<std::string> {};

TEST_P(Experts, GradientsAreSummedOverTheRanksThatHoldTheSame) {
  const std::string kind = GetParam();
  constexpr int kPipeline = 2, kReplicas = 4, kParts = 2;
  const int num_stages = make_schedule({kind, kPipeline, kMicroBatches}).num_stages;
  const auto part_model = [](int part) -> Model {
    return [part](int stage) -> Piece {
      Part module(stage, part);
      return {module.ptr(), [module](const Tensors& x) mutable { return Tensors{module->forward(x[0])}; }};
    };
  };
  // Each replica in one process.
  std::vector<Reference> truths;
  for (int replica = 0; replica < kReplicas; ++replica)
    truths.push_back(reference(part_model(replica % kParts), num_stages, batch_of(kMicroBatches, 0, replica),
                               kMicroBatches, squared_error(), 1.0 / (kReplicas * kMicroBatches)));
  const auto sum_of = [&](int stage, const std::string& name, int first, int step) {
    at::Tensor sum = torch::zeros_like(truths[first].gradients.at(stage).at(name));
    for (int replica = first; replica < kReplicas; replica += step) sum += truths[replica].gradients.at(stage).at(name);
    return sum;
  };
  double squares = 0;
  for (int stage = 0; stage < num_stages; ++stage)
    for (const auto& [name, unused] : truths[0].gradients.at(stage))
      for (int part = 0; part < (name.starts_with("own") ? kParts : 1); ++part)
        squares += (name.starts_with("own") ? sum_of(stage, name, part, kParts) : sum_of(stage, name, 0, 1))
                       .square()
                       .sum()
                       .item<double>();

  for (const Network network : {Network::direct, Network::serial}) {
    run_ranks(kPipeline * kReplicas, [&](std::shared_ptr<Communicator> comm) {
      const Mesh mesh(over(network, comm), {.pipeline = kPipeline, .data = kReplicas, .expert = kParts});
      const int part = mesh.expert()->rank();
      DualPipe pipe(mesh, {.num_micro_batches = kMicroBatches, .schedule = kind}, as_factory(part_model(part)),
                    [](const std::string& name) { return name.find(".own.") != std::string::npos; });
      pipe->step(batch_of(kMicroBatches, 0, mesh.replica()), squared_error());
      for (const int stage : pipe->local_stages()) {
        const auto module = pipe->named_children()["stage" + std::to_string(stage)];
        EXPECT_EQ(module->named_buffers()["own.part"].item<std::int64_t>(), part);
        for (const auto& item : module->named_parameters()) {
          const bool own = item.key().starts_with("own");
          EXPECT_LE(difference(item.value().grad(),
                               own ? sum_of(stage, item.key(), part, kParts) : sum_of(stage, item.key(), 0, 1)),
                    1e-12)
              << stage << item.key();
        }
      }
      const double norm = pipe->clip_grad_norm_(1e9).item<double>();
      EXPECT_NEAR(norm, std::sqrt(squares), 1e-12 * norm);
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Experts, ::testing::ValuesIn(schedule_kinds()),
                         [](const auto& kind) { return "schedule_" + kind.param; });

}  // namespace
}  // namespace dualpipe::test
