// What a user writes without reading the headers compiles, and trains as in one process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dualpipe/stage/stage_run.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;
using torch::Tensor;

struct TwiceImpl : torch::nn::Module {
  explicit TwiceImpl(int number) : layer(register_module("layer", Layer(number))) {}
  Tensor forward(const Tensor& x) { return layer->forward(layer->forward(x)); }
  Layer layer;
};

static_assert(detail::OwnsModule<torch::nn::Linear> && detail::OwnsModule<torch::nn::Sequential> &&
              detail::OwnsModule<std::shared_ptr<TwiceImpl>>);
static_assert(!detail::OwnsModule<int> && !detail::OwnsModule<Tensor> && !detail::OwnsModule<TwiceImpl> &&
              !detail::OwnsModule<Stage> && !detail::OwnsModule<std::shared_ptr<int>>);
static_assert(!std::is_constructible_v<StageFactory, int> && !std::is_constructible_v<LossFn, int>);

StageContext context() { return {.stage = 2, .micro_batch = 5, .extras = {torch::ones({2}, f64())}}; }

Tensors run(const Stage& stage, const Tensors& inputs) { return stage.forward(inputs, context()).outputs(); }

TEST(NaturalForms, ComputeTakesAndReturnsTensorsOneByOne) {
  const Tensor a = seeded({2}, 1), b = seeded({2}, 2);
  const auto first = [&](auto function, const Tensors& inputs) {
    const Tensors outputs = run(Stage().compute("f", function), inputs);
    return outputs.at(0);
  };
  EXPECT_TRUE(
      torch::equal(first([](const Tensors& x, const StageContext& c) { return x[0] + c.extras[0]; }, {a}), a + 1));
  EXPECT_TRUE(torch::equal(first([](const Tensors& x) { return x[0] * 2; }, {a}), a * 2));
  EXPECT_TRUE(torch::equal(first([](const Tensors& x) { return Tensors{x[1], x[0]}; }, {a, b}), b));
  EXPECT_TRUE(torch::equal(first([](const Tensor& x) { return x * 3; }, {a}), a * 3));
  EXPECT_TRUE(torch::equal(first([](Tensor x, Tensor y) { return x - y; }, {a, b}), a - b));
  EXPECT_TRUE(torch::equal(first([](const Tensor& x) { return std::tuple(x * 5, x); }, {a}), a * 5));
  int calls = 0;
  const Stage counting = Stage().compute("f", [&calls, n = 0](const Tensor& x) mutable { return calls = ++n, x * n; });
  run(counting, {a});
  EXPECT_TRUE(torch::equal(run(counting, {a})[0], a * 2));
  EXPECT_EQ(calls, 2);
  EXPECT_THAT(message_of([&] { first([](const Tensor& x) { return x; }, {a, b}); }),
              HasSubstr("node 'f' of stage 2 does not take 2 tensors (micro-batch 5)"));
}

TEST(NaturalForms, AStageOfAHolderOwnsItsModule) {
  Layer module(1);
  EXPECT_EQ(Stage(module).module(), module.ptr());
  EXPECT_EQ(Stage(torch::nn::Sequential(module)).module()->parameters().size(), 2u);
  EXPECT_EQ(Stage(std::make_shared<TwiceImpl>(1)).module()->parameters().size(), 2u);
}

TEST(NaturalForms, AFactoryReturnsModules) {
  const Tensor x = seeded({2, kWidth}, 1);
  const std::vector<StageFactory> factories{
      [](int stage) { return Layer(stage); },
      [](int stage) { return torch::nn::Sequential(Layer(stage)); },
      [](int stage) { return Layer(stage).ptr(); },
      [](int stage) { return as_stage(Layer(stage)); },
      [](int stage) -> Stage {
        return Stage(Layer(stage)).compute("f", [layer = Layer(stage)](const Tensor& y) mutable { return layer(y); });
      },
  };
  for (const StageFactory& factory : factories)
    EXPECT_TRUE(torch::equal(run(factory(3), {x})[0], Layer(3)->forward(x)));
  EXPECT_EQ(StageFactory(), nullptr);
  EXPECT_EQ(StageFactory(nullptr), nullptr);
}

TEST(NaturalForms, AStageThatOwnsAModuleAndComputesNothingIsAnError) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    EXPECT_THAT(
        message_of([&] { DualPipe(comm, {.num_micro_batches = 4}, [](int stage) { return Stage(Layer(stage)); }); }),
        HasSubstr("stage 0 has a module with parameters, but no node that computes with them"));
    DualPipe(comm, {.num_micro_batches = 4}, [](int) { return Stage(torch::nn::GELU()); });
  });
}

TEST(NaturalForms, ALossOfTwoTensors) {
  const Tensor a = seeded({2}, 1), b = seeded({2}, 2);
  const std::vector<LossFn> losses{
      [](const Tensors& outputs, const Tensors& targets) { return torch::mse_loss(outputs[0], targets[0]); },
      [](const Tensor& output, const Tensor& target) { return torch::mse_loss(output, target); },
      [](Tensor output, Tensor target) { return torch::mse_loss(output, target); },
      torch::nn::MSELoss(),
  };
  for (const LossFn& loss : losses) EXPECT_TRUE(torch::equal(loss({a}, {b}), torch::mse_loss(a, b)));
  EXPECT_THAT(message_of([&] { losses[1]({a, b}, {b}); }), HasSubstr("there are 2 outputs and 1 targets"));
  EXPECT_THAT(message_of([&] { losses[3]({a}, {}); }), HasSubstr("there are 1 outputs and 0 targets"));
  LossFn none = nullptr;
  EXPECT_FALSE(none);
  LossFn copy = none;
  EXPECT_FALSE(copy);
}

TEST(NaturalForms, AProgramMadeOfThem) {
  const int num_ranks = 4;
  const Batch batch = random_batch(16, 3);
  const Reference expected = reference(layer, num_ranks, batch, 8, squared_error(), 1.0 / 8);
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe modules(comm, {.num_micro_batches = 8}, [](int stage) { return Layer(stage); });
    EXPECT_EQ(modules->step(batch, torch::nn::MSELoss()).micro_batch_losses(), expected.losses);
    expect_gradients(modules, expected);

    DualPipe stages(comm, {.num_micro_batches = 8}, [](int stage) {
      Layer module(stage);
      return Stage(module).compute("layer", [module](const Tensor& x) mutable { return module->forward(x); });
    });
    const auto loss = [](const Tensor& output, const Tensor& target) { return torch::mse_loss(output, target); };
    EXPECT_EQ(stages->step({.inputs = {batch.inputs[0]}, .targets = {batch.targets[0]}}, loss).micro_batch_losses(),
              expected.losses);
    expect_gradients(stages, expected);
    EXPECT_EQ(stages->evaluate(batch, loss).micro_batch_losses(), expected.losses);

    auto impl = std::make_shared<DualPipeImpl>(comm, DualPipeOptions{.num_micro_batches = 8},
                                               [](int stage) { return Layer(stage).ptr(); });
    EXPECT_EQ(impl->step(batch, loss).micro_batch_losses(), expected.losses);
  });
}

}  // namespace
}  // namespace dualpipe::test
