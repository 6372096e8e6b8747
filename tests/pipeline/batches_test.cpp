// Batches whose micro-batches count differently, are of another number in each step, or split in other ways.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <fstream>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "dualpipe/schedule/generate.hpp"
#include "pipeline/pipeline.hpp"
#include "temporary_folder.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

/// Weights that do not depend on what a loss averages over: all equal ones change nothing, twice as much is the same.
TEST(Weights, CountRelativeToTheirSumOrAsTheyAre) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    Batch batch = random_batch(8, 3);
    const auto step = [&](LossReduction reduction, std::vector<double> weights) {
      DualPipe pipe(comm, {.num_micro_batches = 4, .loss_reduction = reduction}, as_factory(layer));
      batch.weights = std::move(weights);
      const double loss = pipe->step(batch, squared_error()).loss.item<double>();
      return std::pair(loss, pipe->parameters()[0].grad().clone());
    };
    const auto plain = step(LossReduction::mean, {});
    const auto doubled = step(LossReduction::mean, {2, 2, 2, 2});
    EXPECT_NEAR(doubled.first, plain.first, 1e-15);
    EXPECT_LE(difference(doubled.second, plain.second), 1e-15);
    const auto sum = step(LossReduction::sum, {0.25, 0.25, 0.25, 0.25});
    EXPECT_NEAR(sum.first, plain.first, 1e-15);
    EXPECT_LE(difference(sum.second, plain.second), 1e-15);
  });
}

TEST(Weights, ALossOfWeight0NeedsNoGraph) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 2}, as_factory(layer));
    Batch batch = random_batch(4, 3);
    batch.targets[0].narrow(0, 0, 2).zero_();
    batch.weights = {0, 1};
    pipe->step(batch, [](const at::Tensor& x, const at::Tensor& y) {
      return y.count_nonzero().item<std::int64_t>() == 0 ? torch::zeros({}) : torch::mse_loss(x, y);
    });
    const Reference truth = reference(
        layer, 2, Batch{.inputs = {batch.inputs[0].narrow(0, 2, 2)}, .targets = {batch.targets[0].narrow(0, 2, 2)}}, 1,
        squared_error(), 1);
    expect_gradients(pipe, truth);
  });
}

TEST(Weights, ThatCannotBeAreAnErrorOnAllRanks) {
  const auto step = [](int num_replicas, const std::function<std::vector<double>(int rank)>& weights) {
    return failure_on_all(2 * num_replicas, [&](std::shared_ptr<Communicator> comm) {
      const Mesh mesh(comm, {.pipeline = 2, .data = num_replicas});
      DualPipe pipe(mesh, {.num_micro_batches = 2}, as_factory(layer));
      Batch batch = random_batch(4, 1);
      batch.weights = weights(comm->rank());
      std::string message;
      try {
        pipe->step(batch, squared_error());
      } catch (const InvalidArgument& error) {
        message = error.what();
      }
      batch.weights.clear();
      pipe->step(batch, squared_error());  // the pipeline goes on
      if (!message.empty()) throw InvalidArgument(message);
    });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN(), huge = std::numeric_limits<double>::max();
  const auto same = [](std::vector<double> weights) { return [=](int) { return weights; }; };
  EXPECT_THAT(step(1, same({1, -1})), HasSubstr("Batch::weights[1] is -1"));
  EXPECT_THAT(step(1, same({nan, 1})), HasSubstr("Batch::weights[0] is nan"));
  EXPECT_THAT(step(1, same({huge, huge})), HasSubstr("the sum of Batch::weights over all replicas is inf"));
  EXPECT_THAT(step(1, same({0, 0})), HasSubstr("the sum of Batch::weights over all replicas is 0"));
  EXPECT_THAT(step(1, same({1})), HasSubstr("has 1 entries, but there are 2 micro-batches"));
  EXPECT_THAT(step(1, [](int rank) { return std::vector<double>{1, 2.0 + rank}; }),
              HasSubstr("Batch::weights[1] of rank 1 is 3, that of rank 0 is 2"));
  EXPECT_THAT(step(2, [](int rank) { return std::vector<double>(rank % 2 == 0 ? 2 : 0, 1.0); }),
              HasSubstr("in another replica of the pipeline no rank does"));
  EXPECT_EQ(step(2, [](int rank) { return std::vector<double>(2, rank % 2); }), "");  // a replica without any
}

TEST(Metrics, ThatCannotBeEndTheStep) {
  const auto step = [](const LossFn& loss) {
    std::string text;
    run_ranks(1, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, {.num_micro_batches = 2, .schedule = "1f1b"}, as_factory(layer));
      text = message_of([&] { pipe->step(random_batch(4, 1), loss); });
    });
    return text;
  };
  EXPECT_THAT(step([](const at::Tensor& x, const at::Tensor&) { return std::pair(x.mean(), x); }),
              HasSubstr("metric 0 of the loss function must be one real element, is [float64 [2, 6]"));
  EXPECT_THAT(step([](const Tensors& x, const Tensors&) { return Tensors(50, x[0].mean()); }),
              HasSubstr("at most 32 metrics"));
  int calls = 0;
  EXPECT_THAT(step([&](const Tensors& x, const Tensors&) { return Tensors(++calls, x[0].mean()); }),
              HasSubstr("returned 1 metrics, but for the micro-batch before 0"));
  const StageContext context{.stage = 3};
  EXPECT_THAT(message_of([&] { context.add_loss(torch::zeros({})); }), HasSubstr("outside of a compute function"));
}

/// Sums of shared parameters begin with the last of their stages, which is another one for another number.
TEST(Numbers, StagesThatShareParameters) {
  run_ranks(4, [](std::shared_ptr<Communicator> comm) {
    const auto model = [](const Layer& shared) {
      return [shared](int number) { return number == 0 || number == 3 ? shared : Layer(number); };
    };
    Layer truth(0);
    DualPipe pipe(comm, {.num_micro_batches = 8}, model(Layer(0)));
    for (const int count : {8, 2, 1, 3, 5}) {
      const Batch batch = random_batch(2 * count, 5).chunk(count);
      truth->zero_grad();
      Layer first(1), second(2);
      for (const Batch& part : batch.micro_batches) {
        const at::Tensor y = truth->forward(second->forward(first->forward(truth->forward(part.inputs[0]))));
        (torch::mse_loss(y, part.targets[0]) / count).backward();
      }
      pipe->zero_grad();
      pipe->step(batch, squared_error());
      for (const auto& item : pipe->named_parameters()) {
        const std::string name = item.key().substr(7);
        Layer& layer = item.key()[5] == '1' ? first : item.key()[5] == '2' ? second : truth;
        EXPECT_LE(difference(item.value().grad(), layer->named_parameters()[name].grad()), 1e-12)
            << item.key() << ", " << count << " micro-batches";
      }
    }
  });
}

TEST(Numbers, ThatCannotBeAreAnErrorOnAllRanks) {
  const auto parts = [](int count) { return random_batch(2 * count, 1).chunk(count); };
  const TemporaryFolder folder;
  const std::string path = (folder / "own.csv").string();
  std::ofstream(path) << "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n";
  EXPECT_THAT(failure_on_all(2,
                             [&](std::shared_ptr<Communicator> comm) {
                               DualPipe pipe(comm, {.num_micro_batches = 2, .schedule = path}, as_factory(layer));
                               pipe->step(parts(1), squared_error());
                               const std::string text = message_of([&] { pipe->step(parts(3), squared_error()); });
                               pipe->step(parts(2), squared_error());
                               throw InvalidArgument(text);
                             }),
              AllOf(HasSubstr("is for 2 micro-batches and takes fewer, but not 3")));
  EXPECT_THAT(failure_on_all(2,
                             [&](std::shared_ptr<Communicator> comm) {
                               const Mesh mesh(comm, {.pipeline = 1, .data = 2});
                               DualPipe pipe(mesh, {.num_micro_batches = 2, .schedule = "1f1b"}, as_factory(layer));
                               pipe->step(parts(1 + mesh.replica()), squared_error());
                             }),
              HasSubstr("that of rank 0 has 1 micro-batches, that of rank 1 has 2"));
}

TEST(Numbers, ManyInTurnAreForgottenAndMadeAgain) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 2}, as_factory(layer));
    for (int round = 0; round < 2; ++round)
      for (int count = 1; count <= 12; ++count) {
        const Batch batch = random_batch(12, 9).chunk(count);
        EXPECT_EQ(pipe->step(batch, squared_error()).micro_batch_losses().size(), count);
      }
  });
}

TEST(Chunk, CutsUnevenlyAndWeighs) {
  const Batch whole{.inputs = {torch::arange(14).reshape({7, 2})}, .targets = {torch::arange(14).reshape({2, 7})}};
  const BatchSplit split{.targets = {{.dim = 1}}};
  const Batch batch = whole.chunk(3, 0, split);
  EXPECT_EQ(batch.weights, (std::vector<double>{3, 2, 2}));
  Tensors inputs, targets;
  for (const Batch& each : batch.micro_batches) {
    inputs.push_back(each.inputs[0]);
    targets.push_back(each.targets[0]);
  }
  EXPECT_TRUE(torch::equal(torch::cat(inputs), whole.inputs[0]));
  EXPECT_TRUE(torch::equal(torch::cat(targets, 1), whole.targets[0]));
  EXPECT_EQ(whole.chunk(20, 0, split).micro_batches.size(), 7u);

  const auto failure = [&](const Batch& each, int count) { return message_of([&] { each.chunk(count); }); };
  EXPECT_THAT(failure(whole, 3), HasSubstr("targets[0] has 2 samples, Batch::inputs[0] has 7"));
  EXPECT_THAT(failure(whole, 0), HasSubstr("at least 1, got 0"));
  EXPECT_THAT(failure(batch, 2), HasSubstr("made of micro-batches"));
  EXPECT_THAT(failure({.inputs = {torch::empty({0, 3})}}, 2), HasSubstr("no samples"));
  EXPECT_THAT(failure({.inputs = {torch::ones({2})}, .weights = {1}}, 2), HasSubstr("has weights"));
  EXPECT_THAT(message_of([] { Batch::from_micro_batches({{.inputs = {torch::ones({2})}, .weights = {1}}, {}}); }),
              HasSubstr("micro-batch 1 has 0 weights, micro-batch 0 has 1"));
  EXPECT_EQ(Batch::from_micro_batches({{.weights = {1}}, {.weights = {3}}}).weights, (std::vector<double>{1, 3}));
}

TEST(Splits, ADimensionTheWholeOrAList) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    const BatchSplit split{.inputs = {{.dim = 1}, {Split::How::whole}, {Split::How::list}}, .targets = {{}}};
    DualPipe pipe(comm, {.num_micro_batches = 2, .split = split}, [](int number) {
      return Stage().compute(
          "node", [number](const Tensors& x) { return number == 0 ? Tensors{x[0].t() * x[1] + x[2].sum()} : x; });
    });
    const at::Tensor x = seeded({3, 4}, 1), scale = seeded({3}, 2), first = seeded({2}, 3), second = seeded({5, 1}, 4);
    const Batch batch{.inputs = {x, scale, first, second}, .targets = {torch::zeros({4, 3}, f64())}};
    const at::Tensor truth =
        x.t() * scale + torch::stack({first.sum(), first.sum(), second.sum(), second.sum()}).unsqueeze(1);
    const Tensors everywhere = pipe->predict(batch, /*everywhere=*/true);
    EXPECT_LE(difference(everywhere.at(0), truth), 1e-15);
    EXPECT_NEAR(pipe->evaluate(batch, squared_error()).loss.item<double>(), truth.pow(2).mean().item<double>(), 1e-12);

    const auto leaves = [&] {
      Tensors inputs;
      for (const at::Tensor& input : batch.inputs) inputs.push_back(input.clone().requires_grad_());
      return inputs;
    };
    const Tensors asked = leaves(), own = leaves();
    const at::Tensor sums = torch::stack({own[2].sum(), own[2].sum(), own[3].sum(), own[3].sum()}).unsqueeze(1);
    torch::mse_loss(own[0].t() * own[1] + sums, batch.targets[0]).backward();
    const Tensors gradients = pipe->step({.inputs = asked, .targets = batch.targets}, squared_error()).input_gradients;
    ASSERT_EQ(gradients.size(), 4u);
    for (std::size_t i = 0; i < own.size(); ++i) EXPECT_LE(difference(gradients[i], own[i].grad()), 1e-12) << i;

    Batch lacking = batch;
    lacking.inputs.pop_back();
    EXPECT_THAT(message_of([&] { pipe->predict(lacking); }),
                HasSubstr("Batch::inputs has 3 tensors, but DualPipeOptions::split.inputs is for 4"));
    EXPECT_THAT(message_of([&] { pipe->predict(batch, comm->rank() == 1); }), HasSubstr("predict() for all ranks"));
  });
  EXPECT_THAT(failure_on_all(2,
                             [](auto comm) {
                               BatchSplit split;
                               if (comm->rank() == 1) split.extras = {{Split::How::whole}};
                               DualPipe(comm, {.num_micro_batches = 2, .split = split}, as_factory(layer));
                             }),
              AllOf(HasSubstr("extras []"), HasSubstr("extras [whole]")));
}

TEST(BroadcastBatch, GivesEachRankWhatItNeeds) {
  for (const std::string kind : {"dualpipe", "1f1b", "dualpipev"})
    run_ranks(4, [&](std::shared_ptr<Communicator> comm) {
      const Mesh mesh(comm, {.pipeline = kind == "dualpipe" ? 4 : 2, .data = kind == "dualpipe" ? 1 : 2});
      const int N = 8, num_ranks = mesh.pipeline()->size();
      const int num_stages = make_schedule({kind, num_ranks, N}).num_stages;
      DualPipe pipe(mesh, {.num_micro_batches = N, .schedule = kind}, as_factory(layer));
      for (const bool cut : {false, true}) {
        Batch loaded = random_batch(2 * N, 7 + mesh.replica());
        loaded.extras = {seeded({2 * N}, 3)};
        if (cut) loaded = loaded.chunk(5);
        const Batch batch = pipe->broadcast_batch(mesh.pipeline()->rank() == 0 ? loaded : Batch{});
        const Batch& part = cut ? batch.micro_batches.at(4) : batch;
        const Batch& expected = cut ? loaded.micro_batches.at(4) : loaded;
        ASSERT_EQ(part.extras.size(), 1u);
        EXPECT_TRUE(torch::equal(part.extras[0], expected.extras[0]));
        if (mesh.pipeline()->rank() != 0) {
          EXPECT_EQ(part.inputs.size(), pipe->feeds_inputs() ? 1u : 0u);
          EXPECT_EQ(part.targets.size(), pipe->computes_loss() ? 1u : 0u);
        }
        EXPECT_EQ(batch.weights, loaded.weights);
        const StepResult result = pipe->step(batch, squared_error());
        Reference truth;
        for (int replica = 0; replica < mesh.shape().data; ++replica) {
          Batch theirs = random_batch(2 * N, 7 + replica);
          if (cut) theirs = theirs.chunk(5);
          const Reference one = reference(layer, num_stages, theirs, cut ? 5 : N, squared_error(), 1);
          truth.losses.insert(truth.losses.end(), one.losses.begin(), one.losses.end());
        }
        expect_micro_batch_losses(result, truth);
      }
    });
  EXPECT_THAT(failure_on_all(2,
                             [](auto comm) {
                               DualPipe pipe(comm, {.num_micro_batches = 2}, as_factory(layer));
                               pipe->broadcast_batch({});
                             }),
              HasSubstr("broadcast_batch got an empty batch"));
}

}  // namespace
}  // namespace dualpipe::test
