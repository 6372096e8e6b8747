// Runs on every rank of a real launch: dualpipe-run starts this program, and each process compares with its own
// reference.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <chrono>
#include <csignal>
#include <iostream>
#include <string>

#include "dualpipe/comm/socket.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

std::shared_ptr<Communicator> connect(const std::string& name, int epoch = 0) {
  ConnectOptions options;
  options.name = name;
  options.epoch = epoch;
  options.timeout = std::chrono::minutes(1);
  return connect_sockets(World::from_env(), options);
}

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
