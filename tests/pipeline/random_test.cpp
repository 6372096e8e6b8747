// Random numbers follow from a seed, the step, the layer and the micro-batch: neither the schedule nor the number of
// ranks has a part in what a model draws.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "pipeline/noisy.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(Random, SeedsAreTheSameInAllProgramsForever) {
  EXPECT_EQ(layer_seed({}, ""), 0xF51B5B7CE6C27A35u);
  EXPECT_EQ(layer_seed({.seed = 1, .step = 2, .micro_batch = 3, .call = 4}, "layers.5"), 0x362C67F78261CC9Eu);
  EXPECT_EQ(weights_seed(1, "layers.5"), 0x357267378293EAC1u);
  std::set<std::uint64_t> seeds;
  for (const std::string layer : {"a", "b", "ab"})
    for (std::uint64_t seed : {0, 1}) {
      seeds.insert(weights_seed(seed, layer));
      for (std::int64_t step : {0, 1})
        for (std::int64_t micro_batch : {0, 1})
          for (std::int64_t call : {0, 1})
            seeds.insert(layer_seed({.seed = seed, .step = step, .micro_batch = micro_batch, .call = call}, layer) &
                         0xFFFFFFFF);
    }
  EXPECT_EQ(seeds.size(), 3u * 2 * 9);
}

struct Case {
  std::string kind;
  int num_ranks;  // of a pipeline
  int num_replicas = 1;
  bool sharded = false;
};

class NoisyModel : public ::testing::TestWithParam<Case> {};

/// Ranks are threads, which draw from the generator of the context. One rank has LibTorch's generators for itself.
TEST_P(NoisyModel, EqualsOneProcessForEveryCut) {
  constexpr int kAll = 8;  // micro-batches of all replicas
  const auto& [kind, num_ranks, num_replicas, sharded] = GetParam();
  const NoisyTruth truth = noisy_truth(kNoisySeed, kAll / num_replicas, num_replicas, 20);
  torch::manual_seed(5);
  const at::Tensor undisturbed = torch::rand({4});
  torch::manual_seed(5);
  run_ranks(num_ranks * num_replicas, [&, kind = kind, num_ranks = num_ranks, num_replicas = num_replicas,
                                       sharded = sharded](const std::shared_ptr<Communicator>& comm) {
    const Mesh mesh(comm, {.pipeline = num_ranks, .data = num_replicas});
    for (const bool of_context : {true, false})
      if (of_context || comm->size() == 1)
        expect_noisy_truth(mesh,
                           {.num_micro_batches = kAll / num_replicas,
                            .schedule = kind,
                            .seed = kNoisySeed,
                            .shard_optimizer = sharded},
                           of_context, truth);
  });
  EXPECT_TRUE(torch::equal(torch::rand({4}), undisturbed)) << "the caller's state comes back";
}

std::vector<Case> cases() {
  std::vector<Case> all{{"gpipe", 1}, {"zbv", 1}};
  for (const std::string& kind : schedule_kinds()) {
    all.push_back({kind, 4});
    for (const bool sharded : {false, true}) all.push_back({kind, 2, 2, sharded});
  }
  all.push_back({"dualpipe", 4, 1, true});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Kinds, NoisyModel, ::testing::ValuesIn(cases()), [](const auto& each) {
  return each.param.kind + "_" + std::to_string(each.param.num_ranks) + "x" + std::to_string(each.param.num_replicas) +
         (each.param.sharded ? "_sharded" : "");
});

/// What stages draw that were made by hand, by stage and micro-batch, and their first weights.
struct Drawn {
  std::map<std::pair<int, int>, double> numbers;
  std::map<int, at::Tensor> weights;
};

Drawn drawn_by_hand(const DualPipeOptions& options) {
  Drawn drawn;
  std::mutex mutex;
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe(comm, options, [&](int) {
      Noisy module;
      return Stage(module).compute("draw", [&, module](const Tensors& x, const StageContext& context) mutable {
        const double number = torch::rand({}, context.generator).item<double>();
        const std::lock_guard lock(mutex);
        drawn.numbers[{context.stage, context.micro_batch}] = number;
        return module->linear(x[0]);
      });
    });
    pipe->step(noisy_batch(8, 0), squared_error());
    const std::lock_guard lock(mutex);
    for (const int stage : pipe->local_stages())
      drawn.weights[stage] = pipe->named_children()["stage" + std::to_string(stage)]->parameters()[0].detach();
  });
  return drawn;
}

TEST(Random, StagesMadeByHandDifferAndRepeat) {
  const DualPipeOptions options{.num_micro_batches = 8, .seed = 3};
  const Drawn first = drawn_by_hand(options), again = drawn_by_hand(options);
  EXPECT_EQ(first.numbers, again.numbers);
  std::set<double> numbers;
  for (const auto& [place, number] : first.numbers) numbers.insert(number);
  EXPECT_EQ(numbers.size(), 4u * 8);
  for (int s = 0; s < 4; ++s) {
    EXPECT_TRUE(torch::equal(first.weights.at(s), again.weights.at(s)));
    for (int other = 0; other < s; ++other) EXPECT_FALSE(torch::equal(first.weights.at(s), first.weights.at(other)));
  }
  at::Generator of_key = at::detail::createCPUGenerator(layer_seed({.seed = 3, .micro_batch = 5}, "stage2"));
  EXPECT_EQ(first.numbers.at({2, 5}), torch::rand({}, of_key).item<double>());
}

/// As a sampler needs it, or dropout that is left on: the same mask would be drawn again and again.
TEST(Random, EachEvaluationAndPredictionDrawsAnew) {
  run_ranks(2, [](const std::shared_ptr<Communicator>& comm) {
    const auto make = [&] {
      return DualPipe(comm, {.num_micro_batches = 4, .schedule = "1f1b", .seed = 7}, split(noisy_layers(true), 2));
    };
    const Batch batch = noisy_batch(4, 0);
    const auto losses = [&](DualPipe& pipe) { return pipe->evaluate(batch, squared_error()).micro_batch_losses(); };
    const auto step = [&](DualPipe& pipe) { return pipe->step(batch, squared_error()).micro_batch_losses(); };
    DualPipe pipe = make(), again = make(), without = make();
    const auto first = losses(pipe), second = losses(pipe), trained = step(pipe), third = losses(pipe);
    EXPECT_NE(first, second);
    EXPECT_NE(first, trained);
    EXPECT_NE(first, third);
    again->predict(batch);  // the first call
    EXPECT_EQ(losses(again), second);
    EXPECT_EQ(step(without), trained) << "evaluations change nothing in training";
    EXPECT_EQ(losses(without), third);
  });
}

TEST(Random, GoesOnFromTheStepThatIsSet) {
  run_ranks(2, [](const std::shared_ptr<Communicator>& comm) {
    const auto make = [&] { return DualPipe(comm, {.num_micro_batches = 4, .seed = 7}, split(noisy_layers(true), 2)); };
    const Batch batch = noisy_batch(4, 0);
    DualPipe pipe = make(), later = make();
    pipe->step(batch, squared_error());
    later->set_step(1);
    EXPECT_EQ(pipe->step(batch, squared_error()).micro_batch_losses(),
              later->step(batch, squared_error()).micro_batch_losses());
    EXPECT_THAT(message_of([&] { pipe->set_step(-1); }), HasSubstr("must not be negative, got -1"));
    pipe->set_step(comm->rank() == 0 ? 5 : 6);
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }),
                AllOf(HasSubstr("rank 0 has 5 steps behind it, rank 1 has 6"), HasSubstr("set_step()")));
    pipe->set_step(2);
    pipe->step(batch, squared_error());
  });
}

TEST(Random, RanksAgreeAboutTheSeed) {
  EXPECT_THAT(failure_on_all(2,
                             [](const std::shared_ptr<Communicator>& comm) {
                               DualPipeOptions options{.num_micro_batches = 4};
                               if (comm->rank() == 1) options.seed = 7;
                               DualPipe(comm, options, as_factory(layer));
                             }),
              AllOf(HasSubstr("ranks disagree about the options"), HasSubstr("seed none"), HasSubstr("seed 7")));
}

TEST(Random, WithoutASeedNothingIsTouched) {
  run_ranks(2, [](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe(comm, {.num_micro_batches = 4}, [](int s) {
      Layer module(s);
      return Stage(module).compute("f", [module](const Tensors& x, const StageContext& context) mutable {
        EXPECT_FALSE(context.generator.defined());
        EXPECT_FALSE(context.random.has_value());
        torch::rand({}, context.generator);
        return module(x[0]);
      });
    });
    pipe->step(noisy_batch(4, 0), squared_error());
  });
}

}  // namespace
}  // namespace dualpipe::test
