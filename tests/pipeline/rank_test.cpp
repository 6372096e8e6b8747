// Runs on every rank of a real launch: dualpipe-run starts this program, and each process compares with its own
// reference.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/socket.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "pipeline/items.hpp"
#include "pipeline/noisy.hpp"
#include "pipeline/pipeline.hpp"
#include "pipeline/resources.hpp"

namespace dualpipe::test {
namespace {

std::shared_ptr<Communicator> connect(const std::string& name, int epoch = 0) {
  ConnectOptions options;
  options.name = name;
  options.epoch = epoch;
  options.timeout = std::chrono::minutes(1);
  return connect_sockets(World::from_env(), options);
}

/// The first weights of stages that are made by hand, and whether random numbers follow from a seed.
std::pair<std::vector<double>, bool> made_by_hand(const std::shared_ptr<Communicator>& comm) {
  bool seeded = false;
  DualPipe pipe(comm, {.num_micro_batches = 2 * comm->size()}, [&](int) {
    Noisy module;
    return Stage(module).compute("draw", [&, module](const Tensors& x, const StageContext& context) mutable {
      seeded = context.random.has_value();
      return module->forward(x[0], {});
    });
  });
  pipe->step(noisy_batch(2 * comm->size(), 0), squared_error());
  std::vector<double> firsts;
  for (const int stage : pipe->local_stages())
    firsts.push_back(
        pipe->named_children()["stage" + std::to_string(stage)]->parameters()[0].flatten()[0].item<double>());
  return {firsts, seeded};
}

/// The first test of the program: later ones seed.
TEST(Rank, AProcessBeginsWithASeedOfItsOwn) { EXPECT_FALSE(made_by_hand(connect("unseeded")).second); }

TEST(Rank, GradientsEqualOneProcess) {
  const auto comm = connect("gradients");
  for (const std::string& kind : schedule_kinds()) {
    for (const Publish publish : {Publish::early, Publish::atomic}) {
      SCOPED_TRACE(kind);
      const int num_micro_batches = 2 * comm->size() + (kind == "dualpipe" ? 0 : 1);
      const int num_stages = make_schedule({kind, comm->size(), num_micro_batches}).num_stages;
      const Batch batch = random_batch(2 * num_micro_batches, 7);
      const Reference expected =
          reference(layer, num_stages, batch, num_micro_batches, squared_error(), 1.0 / num_micro_batches);
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches, .schedule = kind, .publish = publish},
                    as_factory(layer));
      for (int step = 1; step <= 2; ++step) {
        EXPECT_EQ(pipe->step(batch, squared_error()).micro_batch_losses(), expected.losses);
        expect_gradients(pipe, expected, 1e-12, step);
      }
      EXPECT_EQ(pipe->evaluate(batch, squared_error()).micro_batch_losses(), expected.losses);
      EXPECT_EQ(pipe->predict(batch).empty(), !pipe->computes_loss());
    }
  }
}

TEST(Rank, ItemsEqualOneProcess) {
  const auto comm = connect("items");
  std::map<std::pair<int, int>, Mesh> meshes;
  for (const Layout& layout : layouts_of(comm->size())) {
    const auto& [pipeline, data] = std::pair(layout.mesh.pipeline, layout.mesh.data);
    const Mesh& mesh = meshes.try_emplace({pipeline, data}, comm, layout.mesh).first->second;
    for (const Item& item : items()) expect_item(item, mesh, layout.kind, item.truth(layout));
  }
}

TEST(Rank, ReplicasTrainAsOneProcess) {
  const auto comm = connect("replicas");
  const Mesh mesh(comm, {.pipeline = comm->size() / 2, .data = 2});
  for (const std::string& kind : schedule_kinds()) {
    SCOPED_TRACE(kind);
    const int num_ranks = mesh.pipeline()->size(), num_micro_batches = 2 * num_ranks;
    const int num_stages = make_schedule({kind, num_ranks, num_micro_batches}).num_stages;
    Reference sum;
    for (const int replica : {0, 1}) {
      Reference one = reference(layer, num_stages, random_batch(2 * num_micro_batches, 7 + replica), num_micro_batches,
                                squared_error(), 0.5 / num_micro_batches);
      sum.losses.insert(sum.losses.end(), one.losses.begin(), one.losses.end());
      for (auto& [stage, gradients] : one.gradients)
        for (auto& [name, gradient] : gradients) {
          at::Tensor& all = sum.gradients[stage][name];
          all = all.defined() ? all + gradient : gradient;
        }
    }
    DualPipe pipe(mesh, {.num_micro_batches = num_micro_batches, .schedule = kind}, as_factory(layer));
    for (int step = 1; step <= 3; ++step) {
      const Batch batch = random_batch(2 * num_micro_batches, 7 + mesh.replica());
      EXPECT_EQ(pipe->step(batch, squared_error()).micro_batch_losses(), sum.losses);
      expect_gradients(pipe, sum, 1e-12, step);
    }
  }
}

/// With dropout, ranks draw from generators of their own; seeded alike per stage and micro-batch they equal one
/// process.
TEST(Rank, DropoutSeededPerMicroBatch) {
  const auto comm = connect("dropout");
  const int num_micro_batches = 2 * comm->size();
  const auto drop = [](const at::Tensor& x, int stage, int micro_batch) {
    torch::manual_seed(static_cast<std::uint64_t>(1 + stage * 1000 + micro_batch));
    return torch::dropout(x, 0.3, true);
  };
  const Batch batch = random_batch(2 * num_micro_batches, 5);
  std::vector<Layer> model;
  for (int s = 0; s < comm->size(); ++s) model.emplace_back(s);
  int m = 0;
  for (const Batch& part : split_batch(batch, num_micro_batches, 0)) {
    auto x = part.inputs[0];
    for (int s = 0; s < comm->size(); ++s) x = model[s]->forward(drop(x, s, m));
    (torch::mse_loss(x, part.targets[0]) / num_micro_batches).backward();
    ++m;
  }
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches}, [&](int number) {
    Layer module(number);
    return Stage(module.ptr()).compute("layer", [=](const Tensors& x, const StageContext& context) mutable {
      return Tensors{module->forward(drop(x[0], context.stage, context.micro_batch))};
    });
  });
  pipe->step(batch, squared_error());
  for (const int stage : pipe->local_stages())
    for (const auto& item : pipe->named_children()["stage" + std::to_string(stage)]->named_parameters())
      EXPECT_LE(difference(item.value().grad(), model[stage]->named_parameters()[item.key()].grad()), 1e-12);
}

/// LibTorch's generators are the rank's own: what draws from them follows from the seed as well.
TEST(Rank, DropoutOfASeedEqualsOneProcess) {
  const auto comm = connect("random");
  const Mesh mesh(comm, {.pipeline = comm->size()});
  const NoisyTruth truth = noisy_truth(kNoisySeed, 8, 1, 2);
  for (const bool of_context : {true, false})
    for (const std::string kind : {"dualpipe", "zbv", "interleaved", "1f1b"}) {
      SCOPED_TRACE(kind);
      expect_noisy_truth(mesh, {.num_micro_batches = 8, .schedule = kind, .seed = kNoisySeed}, of_context, truth);
    }
}

TEST(Rank, ASeedAtTheTopOfMainIsThatOfThePipeline) {
  const auto comm = connect("seeded");
  const Mesh mesh(comm, {.pipeline = comm->size()});
  torch::manual_seed(kNoisySeed);
  expect_noisy_truth(mesh, {.num_micro_batches = 8, .schedule = "zbv"}, false, noisy_truth(kNoisySeed, 8, 1, 2));

  std::vector<double> mine;
  for (int round = 0; round < 2; ++round) {
    torch::manual_seed(3);
    const auto [firsts, seeded] = made_by_hand(comm);
    EXPECT_TRUE(seeded);
    if (round > 0) {
      EXPECT_EQ(firsts, mine) << "processes repeat";
    }
    mine = firsts;
  }
  std::set<double> firsts;
  for (const at::Tensor& each : comm->all_gather(torch::tensor(mine, f64())).take())
    for (int i = 0; i < each.numel(); ++i) firsts.insert(each[i].item<double>());
  EXPECT_EQ(std::ssize(firsts), comm->size()) << "stages begin different";

  torch::manual_seed(static_cast<std::uint64_t>(comm->rank()));
  EXPECT_FALSE(made_by_hand(comm).second) << "each rank has chosen its own";
}

TEST(Rank, OutputsThatShareMemoryAreReadButNotWritten) {
  const auto comm = connect("shared");
  const int num_micro_batches = 2 * comm->size();
  const Batch batch = random_batch(2 * num_micro_batches, 5);
  bool writes = false;
  const Model model = [&writes](int stage) {
    Layer module(stage);
    return Piece{module.ptr(), [=, &writes](const Tensors& x) mutable {
                   if (writes && stage == 1) x[0].mul_(2);
                   const at::Tensor y = module->forward(x.size() == 1 ? x[0] : x[0] + x[1].sum() * 0.01);
                   return Tensors{y, y.narrow(1, 1, 2)};
                 }};
  };
  const Reference expected =
      reference(model, comm->size(), batch, num_micro_batches, squared_error(), 1.0 / num_micro_batches);
  DualPipe pipe(comm, {.num_micro_batches = num_micro_batches}, as_factory(model));
  pipe->step(batch, squared_error());
  expect_gradients(pipe, expected);
  writes = true;
  EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }),
              ::testing::HasSubstr("stage 1 writes in place into tensor 0 or 1"));
  expect_gradients(pipe, expected);
}

/// The others report what they saw; the test that launches this reads it.
TEST(Rank, OneIsKilledInTheMiddleOfAStep) {
  const auto comm = connect("killed");
  const Batch batch = random_batch(16, 3);
  bool armed = false;
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8}, [&](int number) {
    const Piece piece = layer(number);
    return Stage(piece.module).compute("piece", [&, piece](const Tensors& x, const StageContext& context) {
      if (armed && comm->rank() == 2 && context.micro_batch == 5) std::raise(SIGKILL);
      return piece.forward(x);
    });
  });
  pipe->step(batch, squared_error());
  std::vector<at::Tensor> gradients;
  for (const auto& parameter : pipe->parameters()) gradients.push_back(parameter.grad().clone());
  armed = true;
  const std::string message = message_of([&] { pipe->step(batch, squared_error()); });
  std::size_t i = 0;
  for (const auto& parameter : pipe->parameters()) EXPECT_TRUE(torch::equal(parameter.grad(), gradients[i++]));
  EXPECT_THAT(message, ::testing::HasSubstr("rank 2"));
  if (!HasFailure()) std::cout << "survived: " << message << std::endl;
}

/// The launcher says which rank it was; the test that launches this reads it.
TEST(Rank, OneFailsInTheMiddleOfAStep) {
  ConnectOptions options;
  options.name = "failing";
  options.timeout = std::chrono::minutes(1);
  options.liveness = std::chrono::seconds(3);
  const auto comm = connect_sockets(World::from_env(), options);
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8}, [&](int number) {
    const Piece piece = layer(number);
    return Stage(piece.module).compute("piece", [&, piece](const Tensors& x, const StageContext& context) {
      if (comm->rank() == 2 && context.micro_batch == 5) {
        if (std::getenv("DUALPIPE_TEST_STOP") != nullptr) std::raise(SIGSTOP);
        throw std::out_of_range("no such token");
      }
      return piece.forward(x);
    });
  });
  try {
    pipe->step(random_batch(16, 3), squared_error());
  } catch (const std::exception& error) {
    report_failure(World::from_env(), error);
    FAIL() << "as it should";
  }
}

/// What an optimizer throws is the user's. Here the rank unwinds because of it, and the others miss it.
TEST(Rank, OneThrowsOutsideOfAStep) {
  int rank = -1;
  const std::string message = message_of([&] {
    const auto comm = connect("optimizer");
    rank = comm->rank();
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8}, as_factory(layer));
    for (;;) {
      pipe->step(random_batch(16, 3), squared_error());
      if (rank == 2) throw std::runtime_error("learning rate of NaN");
    }
  });
  EXPECT_THAT(message, ::testing::HasSubstr(rank == 2 ? "learning rate of NaN" : "while an exception unwound it"));
}

/// The test that launches this reads the records.
TEST(Rank, OneThrowsInAStepAndAllLeaveRecords) {
  const auto comm = connect("records");
  const char* const folder = std::getenv("DUALPIPE_TEST_FOLDER");
  ASSERT_NE(folder, nullptr);
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8, .record_to = folder}, [&](int number) {
    const Piece piece = layer(number);
    return Stage(piece.module).compute("piece", [&, piece](const Tensors& x, const StageContext& context) {
      if (comm->rank() == 2 && context.micro_batch == 5) throw 42;
      return piece.forward(x);
    });
  });
  const std::string message = message_of([&] { pipe->step(random_batch(16, 3), squared_error()); });
  EXPECT_THAT(message, ::testing::ContainsRegex("rank 2: forward of stage 1, micro-batch 5: .*: 42"));
  EXPECT_THAT(message, ::testing::ContainsRegex("\nrank 2 .*<-- here"));
  EXPECT_THAT(message, ::testing::HasSubstr("rank 2 did last, in step 0:"));
}

TEST(Rank, PipelinesAndFailuresLeaveNothing) {
  const Batch batch = random_batch(4, 3);
  Resources before;
  for (int round = 0; round < 30; ++round) {
    if (round == 6) before = Resources::now();
    const auto comm = connect("leaks", round);
    const int bad = round % 2 == 0 ? -1 : round / 2 % comm->size();
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 4}, [&](int number) {
      const Piece piece = layer(number);
      return Stage(piece.module).compute("piece", [&, piece](const Tensors& x, const StageContext& context) {
        if (comm->rank() == bad && context.micro_batch == 3) throw std::runtime_error("boom");
        return piece.forward(x);
      });
    });
    const std::string message = message_of([&] { pipe->step(batch, squared_error()); });
    EXPECT_EQ(message.find("boom") != std::string::npos, bad >= 0) << message;
  }
  const Resources after = Resources::now();
  EXPECT_EQ(after.descriptors, before.descriptors);
  EXPECT_EQ(after.threads, before.threads);
  EXPECT_LT(after.resident_bytes, before.resident_bytes + (std::int64_t{32} << 20));
}

/// A rank that fails right after a step reaches ranks that still wait in the vote of that step.
TEST(Rank, AStepIsOverEverywhereOrNowhere) {
  for (int round = 0; round < 12; ++round) {
    SCOPED_TRACE(round);
    const auto comm = connect("steps", 2 * round);
    const std::string kind = round % 2 == 0 ? "1f1b" : "dualpipe";
    const int bad = round / 2 % comm->size();
    const int num_replicas = round < 8 ? 1 : 2;
    int over = 0;
    const Mesh mesh(comm, {.pipeline = comm->size() / num_replicas, .data = num_replicas});
    DualPipe pipe(mesh, DualPipeOptions{.num_micro_batches = 2 * comm->size(), .schedule = kind}, as_factory(layer));
    const Batch batch = random_batch(4 * comm->size(), 3);
    EXPECT_THAT(message_of([&] {
                  for (;; ++over) {
                    if (over == 5 && comm->rank() == bad) comm->abort("a bad token");
                    pipe->step(batch, squared_error());
                  }
                }),
                ::testing::HasSubstr("a bad token"));
    const auto all = connect("steps", 2 * round + 1)->all_gather(torch::tensor(over)).take();
    for (const at::Tensor& each : all) EXPECT_EQ(each.item<int>(), 5);
  }
}

}  // namespace
}  // namespace dualpipe::test
