#include "dualpipe/stage/stage.hpp"
#include "dualpipe/stage/stage_run.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "dualpipe/error.hpp"
#include "dualpipe/stage/as_stage.hpp"
#include "error_of.hpp"

namespace dualpipe {
namespace {

using test::error_of;

using testing::AllOf;
using testing::HasSubstr;
using torch::Tensor;

Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes, torch::kDouble); }
Tensor input(at::IntArrayRef sizes) { return random(sizes).requires_grad_(); }

StageContext context(int stage = 0, bool training = true) { return {stage, 5, 0, training}; }

TEST(Stage, OutputsAreDetachedAndKeepWhetherTheyRequireGrad) {
  const Tensor w = input({4, 4});
  Stage stage;
  stage.compute("f", [&](const Tensors& x, const StageContext&) -> Tensors {
    return {x[0].mm(w), x[1], x[0].detach(), Tensor(), x[0]};
  });
  const Tensor x = input({3, 4}), integers = torch::arange(3);
  auto activation = stage.forward({x, integers}, context());
  ASSERT_EQ(activation.outputs().size(), 5U);
  EXPECT_TRUE(activation.outputs()[0].requires_grad());
  EXPECT_TRUE(activation.outputs()[0].is_leaf());
  EXPECT_TRUE(torch::equal(activation.outputs()[0], x.mm(w)));
  EXPECT_TRUE(torch::equal(activation.outputs()[1], integers));
  EXPECT_FALSE(activation.outputs()[1].requires_grad());
  EXPECT_FALSE(activation.outputs()[2].requires_grad());
  EXPECT_FALSE(activation.outputs()[3].defined());
  EXPECT_TRUE(activation.outputs()[4].requires_grad());
  EXPECT_TRUE(activation.outputs()[4].is_alias_of(x));
  EXPECT_FALSE(activation.loss().defined());
}

TEST(Stage, NodesRunInOrderAsOneGraph) {
  const Tensor w = input({4, 4});
  Stage stage;
  stage.compute("first", [&](const Tensors& x, const StageContext&) -> Tensors { return {x[0].mm(w), x[0]}; })
      .compute("second", [&](const Tensors& h, const StageContext& c) -> Tensors {
        EXPECT_EQ(h.size(), 2U);
        EXPECT_EQ(c.micro_batch, 5);
        return {torch::tanh(h[0]).mm(w) + h[1] * c.extras.at(0)};
      });
  EXPECT_THAT(stage.node_names(), testing::ElementsAre("first", "second"));
  const Tensors extras{random({4})};
  const Tensor x = input({3, 4}), g = random({3, 4});
  auto activation = stage.forward({x}, StageContext{0, 5, 0, true, extras});
  const Tensors gradients = activation.backward_input({g});
  EXPECT_FALSE(w.grad().defined());
  activation.backward_weight();

  const Tensor plain_w = w.detach().clone().requires_grad_();
  (torch::tanh(x.mm(plain_w)).mm(plain_w) + x * extras[0]).backward(g);
  EXPECT_TRUE(torch::equal(gradients[0], x.grad()));
  EXPECT_TRUE(torch::equal(w.grad(), plain_w.grad()));
}

TEST(Stage, WithoutNodesReturnsItsInputs) {
  const Tensor x = input({3, 4}), g = random({3, 4});
  auto activation = Stage().forward({x}, context());
  EXPECT_TRUE(activation.outputs().at(0).is_alias_of(x));
  EXPECT_TRUE(torch::equal(activation.backward({g}).at(0), g));
}

TEST(Stage, LossRunsInTheSameGraph) {
  const Tensor w = input({4, 4}), target = random({3, 4}), x = input({3, 4});
  Stage stage;
  stage.compute("f", [&](const Tensors& in, const StageContext&) -> Tensors { return {in[0].mm(w)}; });
  for (const bool whole : {true, false}) {
    w.mutable_grad() = Tensor();
    x.mutable_grad() = Tensor();
    auto activation = stage.forward({x}, context(), [&](const Tensors& out) {
      EXPECT_TRUE(out.at(0).requires_grad());
      return torch::mse_loss(out.at(0), target).reshape({1, 1});
    });
    EXPECT_EQ(activation.loss().dim(), 0);
    EXPECT_FALSE(activation.loss().requires_grad());
    EXPECT_TRUE(activation.outputs().at(0).requires_grad());
    const Tensor scale = torch::tensor(0.25, torch::kDouble);
    Tensors gradients;
    if (whole) {
      gradients = activation.backward({scale});
    } else {
      gradients = activation.backward_input({scale});
      activation.backward_weight();
    }
    const Tensor plain_w = w.detach().clone().requires_grad_();
    const Tensor loss = torch::mse_loss(x.mm(plain_w), target);
    loss.backward(scale);
    EXPECT_TRUE(torch::equal(activation.loss(), loss));
    EXPECT_TRUE(torch::equal(gradients.at(0), x.grad()));
    EXPECT_TRUE(torch::equal(w.grad(), plain_w.grad()));
  }
}

TEST(Stage, ALossWithoutGradientLetsNothingFlow) {
  const Stage stage = as_stage(torch::nn::Identity());
  auto activation = stage.forward({random({3, 4})}, context(), [](const Tensors& out) { return out[0].mean(); });
  const Tensors gradients = activation.backward_input({torch::ones({}, torch::kDouble)});
  activation.backward_weight();
  ASSERT_EQ(gradients.size(), 1U);
  EXPECT_FALSE(gradients[0].defined());
}

TEST(Stage, RefusesALossThatIsNotOneNumber) {
  const Stage stage = as_stage(torch::nn::Identity());
  auto message = [&](const Tensor& loss) {
    return error_of([&] { stage.forward({input({3, 4})}, context(3), [&](const Tensors&) { return loss; }); });
  };
  EXPECT_THAT(message(random({3})), HasSubstr("the loss of stage 3 must be one element, got sizes [3]"));
  EXPECT_THAT(message(torch::zeros({0})), HasSubstr("got sizes [0]"));
  EXPECT_THAT(message(torch::ones({}, torch::kLong)), HasSubstr("must be floating point, got Long"));
  EXPECT_THAT(message(Tensor()), HasSubstr("undefined"));
}

TEST(Stage, ChecksTheNumberOfInputsBeforeUserCodeRuns) {
  bool ran = false;
  Stage stage;
  stage.takes(2).compute("f", [&](const Tensors& x, const StageContext&) {
    ran = true;
    return x;
  });
  EXPECT_EQ(error_of([&] { stage.forward({random({2})}, context(3)); }),
            "stage 3 takes 2 tensors, got 1 (micro-batch 5)");
  EXPECT_FALSE(ran);
  EXPECT_NO_THROW(stage.forward({random({2}), random({2})}, context(3)));
  EXPECT_TRUE(ran);
  EXPECT_THAT(error_of([&] { stage.takes(-1); }), HasSubstr("-1"));
  EXPECT_THAT(error_of([&] { stage.compute("empty", nullptr); }), HasSubstr("'empty'"));
}

TEST(Stage, OutsideOfTrainingNoGraphIsMade) {
  const Tensor w = input({4, 4});
  Stage stage;
  stage.compute("f", [&](const Tensors& x, const StageContext& c) -> Tensors {
    EXPECT_FALSE(c.training);
    EXPECT_FALSE(torch::GradMode::is_enabled());
    return {x[0].mm(w)};
  });
  auto activation = stage.forward({input({3, 4})}, context(0, false), [](const Tensors& out) { return out[0].sum(); });
  EXPECT_FALSE(activation.outputs().at(0).requires_grad());
  EXPECT_TRUE(activation.loss().defined());
  EXPECT_TRUE(torch::GradMode::is_enabled());
}

TEST(Stage, TrainsWhereTheCallerHasGradientsDisabled) {
  const torch::NoGradGuard no_grad;
  const Stage stage = as_stage(torch::nn::Linear(4, 4));
  auto activation = stage.forward({torch::randn({3, 4})}, context());
  EXPECT_TRUE(activation.outputs().at(0).requires_grad());
  activation.backward({torch::randn({3, 4})});
  EXPECT_TRUE(stage.module()->parameters().at(0).grad().defined());
  EXPECT_FALSE(torch::GradMode::is_enabled());
}

TEST(Stage, WhatUserCodeThrowsComesThrough) {
  struct Special : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  Stage stage;
  stage.compute("f", [](const Tensors&, const StageContext&) -> Tensors { throw Special("mine"); });
  EXPECT_THROW(stage.forward({}, context()), Special);
  EXPECT_TRUE(torch::GradMode::is_enabled());
}

TEST(Stage, UnsplitBackwardDoesAllInI) {
  Stage stage = as_stage(torch::nn::Linear(4, 4));
  stage.split_backward(false);
  EXPECT_FALSE(stage.splits_backward());
  auto activation = stage.forward({torch::randn({3, 4})}, context());
  activation.backward_input({torch::randn({3, 4})});
  const Tensor gradient = stage.module()->parameters().at(0).grad();
  ASSERT_TRUE(gradient.defined());
  const Tensor before = gradient.clone();
  activation.backward_weight();
  EXPECT_TRUE(torch::equal(before, stage.module()->parameters().at(0).grad()));
}

TEST(Stage, AppendJoinsNodesAndProperties) {
  Stage first = as_stage(torch::nn::Linear(4, 4));
  Stage second;
  second.compute("a", [](const Tensors& x, const StageContext&) { return x; }).split_backward(false).takes(7);
  Stage whole;
  whole.append("one", first).append("two", second);
  EXPECT_THAT(whole.node_names(), testing::ElementsAre("one.forward", "two.a"));
  EXPECT_FALSE(whole.splits_backward());
  EXPECT_FALSE(whole.has_data_dependent_shapes());
  EXPECT_TRUE(Stage().append("three", Stage(second).data_dependent_shapes(true)).has_data_dependent_shapes());
  EXPECT_EQ(whole.module(), nullptr);
  EXPECT_THAT(error_of([&] { whole.forward({}, context()); }), HasSubstr("takes 1 tensor,"));
  whole.append("self", whole);
  EXPECT_THAT(whole.node_names(), testing::ElementsAre("one.forward", "two.a", "self.one.forward", "self.two.a"));
}

// --- collectives, here those of a group of one rank, which need no communicator

/// Multiplies by a number, and turns the tensors round. Ends when it is asked.
struct Scaled final : Collective {
  explicit Scaled(double number) : factor(number) {}
  Launched forward(Tensors inputs, const StageContext& c) override {
    EXPECT_EQ(c.stage, 3);
    ++launched;
    for (const Tensor& tensor : inputs) EXPECT_TRUE(!tensor.defined() || tensor.is_leaf());
    const auto handle = std::make_shared<int>(static_cast<int>(inputs.size()));
    return {join({}, [this, inputs](std::vector<Tensors>) { return scaled(inputs, true); }), handle};
  }
  Pending backward(std::shared_ptr<void> handle, Tensors gradients) override {
    EXPECT_EQ(*std::static_pointer_cast<int>(handle), static_cast<int>(gradients.size()));
    ++launched;
    return join({}, [this, gradients](std::vector<Tensors>) { return scaled(gradients, false); });
  }
  Tensors scaled(Tensors tensors, bool keep) {
    ++finished;
    const torch::NoGradGuard no_grad;
    for (Tensor& tensor : tensors)
      if (tensor.defined() && tensor.is_floating_point())
        tensor = (tensor * factor).set_requires_grad(keep && tensor.requires_grad());
    std::reverse(tensors.begin(), tensors.end());
    return tensors;
  }
  double factor;
  int launched = 0, finished = 0;
};

struct Returns final : Collective {
  Returns(Pending f, Pending b) : ahead(std::move(f)), back(std::move(b)) {}
  Launched forward(Tensors, const StageContext&) override { return {ahead, nullptr}; }
  Pending backward(std::shared_ptr<void>, Tensors) override { return back; }
  Pending ahead, back;
};
Pending gives(Tensors tensors) {
  return join({}, [tensors](std::vector<Tensors>) { return tensors; });
}

// --- random numbers

/// Two layers of one stage, the first of them with a collective in its middle.
Stage drawing_stage() {
  const auto draw = [](const Tensors& x, const StageContext& c) {
    return Tensors{torch::cat({x[0], torch::rand({1}, c.generator, torch::kDouble)})};
  };
  Stage first, second, whole;
  first.compute("a", draw).communicate("x", std::make_shared<Scaled>(1), {0}).compute("b", draw).compute("c", draw);
  second.compute("d", draw);
  return whole.append("first", first.layer("first")).append("second", second.layer("second"));
}

TEST(Random, ALayerGoesOnBehindItsCollectiveWhateverRunsBetween) {
  const auto expected = [](std::int64_t micro_batch) {
    const RandomKey key{.seed = 9, .micro_batch = micro_batch};
    at::Generator first = at::detail::createCPUGenerator(layer_seed(key, "first"));
    at::Generator second = at::detail::createCPUGenerator(layer_seed(key, "second"));
    std::vector<Tensor> drawn;
    for (int i = 0; i < 3; ++i) drawn.push_back(torch::rand({1}, first, torch::kDouble));
    drawn.push_back(torch::rand({1}, second, torch::kDouble));
    return torch::cat(drawn);
  };
  const Stage stage = drawing_stage();
  const at::Generator of_libtorch = at::detail::getDefaultCPUGenerator();
  for (const at::Generator& generator : {at::detail::createCPUGenerator(), of_libtorch, at::Generator()}) {
    torch::manual_seed(4);
    const Tensor undisturbed = torch::rand({2});
    torch::manual_seed(4);
    const auto run_of = [&](std::int64_t micro_batch) {
      StageContext of_run = context(3);
      of_run.generator = generator;
      of_run.random = RandomKey{.seed = 9, .micro_batch = micro_batch};
      return StageRun(stage, {torch::empty({0}, torch::kDouble)}, of_run);
    };
    StageRun one = run_of(1), two = run_of(2);
    while (!one.advanced()) {
      one.advance();
      two.advance();
    }
    one.finish_forward();
    two.finish_forward();
    EXPECT_TRUE(torch::equal(one.outputs()[0], expected(1)));
    EXPECT_TRUE(torch::equal(two.outputs()[0], expected(2)));
    EXPECT_TRUE(torch::equal(torch::rand({2}), undisturbed)) << "the caller's state comes back";
  }
}

TEST(Random, WhatANodeThrowsLeavesTheCallersState) {
  Stage stage;
  stage.compute("f", [](const Tensors&, const StageContext&) -> Tensors {
    torch::rand({3});
    throw std::runtime_error("boom");
  });
  StageContext of_run = context();
  of_run.random = RandomKey{.seed = 9};
  torch::manual_seed(4);
  const Tensor undisturbed = torch::rand({2});
  torch::manual_seed(4);
  EXPECT_THROW(stage.forward({}, of_run), std::runtime_error);
  EXPECT_TRUE(torch::equal(torch::rand({2}), undisturbed));
}

TEST(Random, ALossDrawsByAKeyOfItsOwn) {
  Stage stage;
  StageContext of_run = context();
  of_run.random = RandomKey{.seed = 9};
  const auto run = stage.forward({torch::ones({1}, torch::requires_grad())}, of_run,
                                 [](const Tensors& x) { return x[0] * torch::rand({1}); });
  const SeededDefaults scope(layer_seed({.seed = 9}, ""));
  EXPECT_TRUE(torch::equal(run.loss(), torch::rand({1})[0]));
}

TEST(Random, LayersHaveNames) {
  EXPECT_THAT(error_of([] { Stage().layer(""); }), HasSubstr("needs a name"));
}

// --- backwards that keep state

struct Adder : torch::nn::Module {
  Adder() {
    weight = register_parameter("weight", random({4, 4}));
    calls = register_buffer("calls", torch::zeros({}, torch::kLong));
  }
  Tensor weight, calls;
};

/// What the backward of a linear layer does beside computing the input gradient.
enum class Does { ReturnsTheGradient, AddsTheGradient, AddsTheGradientIfAsked, CountsCalls };

struct KeepsState : torch::autograd::Function<KeepsState> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w, Adder* module,
                        Does does) {
    context->save_for_backward({x, w});
    context->saved_data["module"] = reinterpret_cast<std::int64_t>(module);
    context->saved_data["does"] = static_cast<std::int64_t>(does);
    return x.mm(w);
  }
  static Tensors backward(torch::autograd::AutogradContext* context, Tensors gradients) {
    const auto saved = context->get_saved_variables();
    auto* module = reinterpret_cast<Adder*>(context->saved_data["module"].toInt());
    const auto does = static_cast<Does>(context->saved_data["does"].toInt());
    Tensor weight_gradient = saved[0].t().mm(gradients[0]);
    if (does == Does::AddsTheGradient || (does == Does::AddsTheGradientIfAsked && context->needs_input_grad(1))) {
      Tensor& sum = module->weight.mutable_grad();
      if (sum.defined())
        sum.add_(weight_gradient);
      else
        sum = weight_gradient;
      weight_gradient = Tensor();
    }
    if (does == Does::AddsTheGradientIfAsked) weight_gradient = Tensor();
    if (does == Does::CountsCalls) module->calls.add_(1);
    return {gradients[0].mm(saved[1].t()), weight_gradient, Tensor(), Tensor()};
  }
};

TEST(Stage, ABackwardThatKeepsStateMustNotBeSplit) {
  const Tensor x = input({3, 4}), g = random({3, 4});
  const auto gradient_of = [&](Does does, bool split) {
    const auto module = std::make_shared<Adder>();
    Stage stage(module);
    stage.split_backward(split).compute("f", [module, does](const Tensors& in, const StageContext&) -> Tensors {
      return {KeepsState::apply(in[0], module->weight, module.get(), does)};
    });
    for (int m = 0; m < 2; ++m) {  // into no gradient, and into one
      StageRun run = stage.forward({x}, context(3));
      run.backward_input({g});
      run.backward_weight();
    }
    return module->weight.grad();
  };
  const Tensor expected = 2 * x.detach().t().mm(g);
  EXPECT_TRUE(torch::equal(gradient_of(Does::ReturnsTheGradient, true), expected));
  EXPECT_TRUE(torch::equal(gradient_of(Does::AddsTheGradientIfAsked, true), expected));
  EXPECT_THAT(error_of([&] { gradient_of(Does::AddsTheGradient, true); }),
              AllOf(HasSubstr("backward of stage 3"), HasSubstr("the gradient of parameter 'weight' itself"),
                    HasSubstr("split_backward(false)")));
  EXPECT_THAT(error_of([&] { gradient_of(Does::CountsCalls, true); }), HasSubstr("buffer 'calls'"));
  for (const Does does : {Does::ReturnsTheGradient, Does::AddsTheGradient, Does::CountsCalls})
    EXPECT_TRUE(torch::equal(gradient_of(does, false), expected));
}

TEST(Chain, MergesWhatComputesSideBySide) {
  const auto same = [](const Tensors& x, const StageContext&) { return x; };
  const auto moves = std::make_shared<Scaled>(2);
  Stage stage;
  EXPECT_EQ(stage.structure(), "C");
  EXPECT_EQ(stage.structure(true), "C");
  EXPECT_EQ(stage.chain_name(0), "identity");
  stage.compute("a", same).compute("b", same).compute("c", same);
  EXPECT_EQ(stage.structure(), "C");
  stage.communicate("d", moves, {0}).communicate("e", moves, {1, 0}).compute("f", same).communicate("g", moves, {2});
  EXPECT_EQ(stage.structure(), "CXXCX");
  EXPECT_EQ(stage.structure(true), "CXXCXC");
  EXPECT_EQ(stage.chain_name(0), "a to c");
  EXPECT_EQ(stage.chain_name(1), "d");
  EXPECT_EQ(stage.chain_name(3), "f");
  EXPECT_EQ(stage.chain_name(5), "loss");
  EXPECT_THAT(stage.node_names(), testing::ElementsAre("a", "b", "c", "d", "e", "f", "g"));
  Stage two = stage;
  two.append("x", stage).append("y", as_stage(torch::nn::Identity()));
  EXPECT_EQ(two.structure(), "CXXCXCXXCXC");
  EXPECT_EQ(stage.structure(), "CXXCX");
  EXPECT_EQ(two.chain_name(5), "x.a to x.c");
}

TEST(Chain, MovesWhatItNamesAndLetsTheRestPassBy) {
  const Tensor w = input({4, 4}), x = input({3, 4}), g = random({3, 4}), h = random({3, 4});
  const auto collective = std::make_shared<Scaled>(3);
  Stage stage;
  stage
      .compute("before",
               [&](const Tensors& in, const StageContext&) -> Tensors {
                 return {in[0].mm(w), torch::arange(3), Tensor(), in[0] + 1, in[0].detach()};
               })
      .communicate("turn", collective, {0, 2, 3})
      .compute("after", [&](const Tensors& in, const StageContext&) -> Tensors {
        EXPECT_TRUE(torch::equal(in[1], torch::arange(3)));
        EXPECT_FALSE(in[2].defined());
        EXPECT_TRUE(in[0].requires_grad());
        EXPECT_TRUE(in[3].requires_grad());
        EXPECT_FALSE(in[4].requires_grad());
        return {torch::tanh(in[3]).mm(w), in[0] * in[4]};
      });
  auto activation = stage.forward({x}, context(3));
  const Tensors gradients = activation.backward_input({g, h});
  EXPECT_FALSE(w.grad().defined());
  activation.backward_weight(2);
  const Tensor from_last = w.grad().clone();
  activation.backward_weight(1);  // a collective has no weights
  EXPECT_TRUE(torch::equal(w.grad(), from_last));
  activation.backward_weight(0);

  const Tensor plain_w = w.detach().clone().requires_grad_(), plain_x = x.detach().clone().requires_grad_();
  const Tensor first = plain_x.mm(plain_w) * 3, second = (plain_x + 1) * 3;
  torch::autograd::backward({torch::tanh(first).mm(plain_w), second * plain_x.detach()}, {g, h});
  EXPECT_TRUE(torch::allclose(gradients.at(0), plain_x.grad(), 1e-13, 1e-13));
  EXPECT_TRUE(torch::allclose(w.grad(), plain_w.grad(), 1e-13, 1e-13));
  EXPECT_EQ(collective->launched, 2);
  EXPECT_EQ(collective->finished, 2);
}

TEST(Chain, CollectivesAtBothEndsAndInARow) {
  const Tensor w = input({4, 4}), x = input({3, 4}), y = input({3, 4}), g = random({3, 4}), h = random({3, 4});
  const auto two = std::make_shared<Scaled>(2), five = std::make_shared<Scaled>(5);
  Stage stage;
  stage.communicate("start", two, {0})
      .communicate("again", five, {0})
      .compute("f", [&](const Tensors& in, const StageContext&) -> Tensors { return {in[0].mm(w), in[1]}; })
      .communicate("one", five, {0, 1})
      .communicate("end", two, {0});
  for (const bool whole : {true, false}) {
    w.mutable_grad() = Tensor();
    auto activation = stage.forward({x, y}, context(3));
    ASSERT_EQ(activation.outputs().size(), 2U);
    EXPECT_TRUE(torch::allclose(activation.outputs()[0], y * 10));
    EXPECT_TRUE(torch::allclose(activation.outputs()[1], (x * 10).mm(w) * 5));
    EXPECT_TRUE(activation.outputs()[0].requires_grad());
    EXPECT_TRUE(activation.outputs()[0].is_leaf());
    Tensors gradients;
    if (whole) {
      gradients = activation.backward({g, h});
    } else {
      gradients = activation.backward_input({g, h});
      activation.backward_weight();
    }
    EXPECT_TRUE(torch::allclose(gradients.at(0), h.mm(w.t()) * 50));
    EXPECT_TRUE(torch::allclose(gradients.at(1), g * 10));
    EXPECT_TRUE(torch::allclose(w.grad(), x.t().mm(h) * 50));
  }
}

TEST(Chain, ALossBehindACollectiveGetsItsOwnNode) {
  const Tensor w = input({4, 4}), x = input({3, 4});
  Stage stage;
  stage.compute("f", [&](const Tensors& in, const StageContext&) -> Tensors { return {in[0].mm(w)}; })
      .communicate("g", std::make_shared<Scaled>(2), {0});
  auto activation = stage.forward({x}, context(3), [](const Tensors& out) { return out[0].square().sum(); });
  EXPECT_EQ(activation.num_nodes(), 3);
  const Tensors gradients = activation.backward({torch::ones({}, torch::kDouble)});
  EXPECT_TRUE(torch::allclose(activation.loss(), (x.mm(w) * 2).square().sum()));
  EXPECT_TRUE(torch::allclose(gradients.at(0), (x.mm(w) * 8).mm(w.t())));
}

TEST(Chain, OutsideOfTrainingNothingIsKept) {
  const Tensor w = input({4, 4});
  Stage stage;
  stage.compute("f", [&](const Tensors& in, const StageContext&) -> Tensors { return {in[0].mm(w), in[0]}; })
      .communicate("g", std::make_shared<Scaled>(2), {0, 1});
  auto activation = stage.forward({input({3, 4})}, context(3, false));
  for (int node = 0; node < activation.num_nodes(); ++node) EXPECT_FALSE(activation.keeps_handle(node));
  for (const Tensor& output : activation.outputs()) EXPECT_FALSE(output.requires_grad());
}

TEST(Chain, UnsplitBackwardLeavesNoWeightPart) {
  const Tensor w = input({4, 4});
  const auto f = [&](const Tensors& in, const StageContext&) -> Tensors { return {in[0].mm(w)}; };
  Stage stage;
  stage.compute("f", f).communicate("g", std::make_shared<Scaled>(2), {0}).compute("h", f).split_backward(false);
  auto activation = stage.forward({input({3, 4})}, context(3));
  activation.backward_input({random({3, 4})});
  const Tensor before = w.grad().clone();
  activation.backward_weight();
  EXPECT_TRUE(torch::equal(w.grad(), before));
}

TEST(Chain, RefusesToWriteIntoOneOfTwoTensorsThatShareMemory) {
  const auto running = [](int moved, int written) {
    return error_of([&] {
      Stage stage;
      stage
          .compute("f",
                   [](const Tensors& in, const StageContext&) -> Tensors {
                     const Tensor y = in[0] * 2;
                     return {y, y.view(-1), in[0] * 3};
                   })
          .communicate("g", std::make_shared<Scaled>(2), {moved})
          .compute("h", [&](const Tensors& in, const StageContext&) -> Tensors {
            const Tensor z = in[static_cast<std::size_t>(written)];
            return {z.mul_(2)};
          });
      stage.forward({input({3, 4})}, context(3))
          .backward({random(written == 1 ? std::vector<std::int64_t>{12} : std::vector<std::int64_t>{3, 4})});
    });
  };
  EXPECT_THAT(running(2, 0), HasSubstr("stage 3 writes in place into tensor 0 or 1"));
  EXPECT_THAT(running(2, 1), HasSubstr("stage 3 writes in place into tensor 0 or 1"));
  EXPECT_EQ(running(2, 2), "no InvalidArgument");
  EXPECT_EQ(running(0, 0), "no InvalidArgument");
  EXPECT_EQ(running(0, 1), "no InvalidArgument");
}

TEST(Chain, RefusesWhatDoesNotFit) {
  const auto same = [](const Tensors& x, const StageContext&) { return x; };
  const auto fine = std::make_shared<Scaled>(2);
  EXPECT_THAT(error_of([&] { Stage().communicate("g", nullptr, {0}); }), HasSubstr("node 'g'"));
  EXPECT_THAT(error_of([&] { Stage().communicate("g", fine, {}); }), HasSubstr("moves no tensors"));
  EXPECT_THAT(error_of([&] { Stage().communicate("g", fine, {0, -1}); }), HasSubstr("position -1"));
  EXPECT_THAT(error_of([&] { Stage().communicate("g", fine, {1, 0, 1}); }), HasSubstr("position 1 twice"));

  const Tensor x = input({2});
  const auto running = [&](std::shared_ptr<Collective> collective, std::vector<int> moves) {
    return error_of([&] {
      Stage stage;
      stage.compute("f", same).communicate("g", std::move(collective), std::move(moves)).compute("h", same);
      stage.forward({x}, context(3)).backward({x});
    });
  };
  EXPECT_EQ(running(fine, {0}), "no InvalidArgument");
  EXPECT_THAT(running(fine, {2}), HasSubstr("position 2, but it is given 1 tensor"));
  EXPECT_THAT(running(std::make_shared<Returns>(Pending(), Pending()), {0}), HasSubstr("launched nothing"));
  EXPECT_THAT(running(std::make_shared<Returns>(gives({x, x}), Pending()), {0}),
              HasSubstr("moves 1 tensors, but its forward gave 2"));
  EXPECT_THAT(running(std::make_shared<Returns>(gives({x.detach().requires_grad_()}), Pending()), {0}),
              HasSubstr("in its backward"));
  EXPECT_THAT(running(std::make_shared<Returns>(gives({x.detach().requires_grad_()}), gives({})), {0}),
              HasSubstr("its backward gave 0"));
}

TEST(Join, WaitsForAllAndGivesOnce) {
  Pending pending = join({gives({torch::ones({1})}), gives({torch::zeros({2})})}, [](std::vector<Tensors> parts) {
    EXPECT_EQ(parts.size(), 2U);
    return Tensors{parts[1].at(0)};
  });
  EXPECT_TRUE(pending.done());
  EXPECT_EQ(pending.take().at(0).numel(), 2);
  EXPECT_THAT(error_of([&] { pending.take(); }), HasSubstr("taken before"));
  EXPECT_THAT(error_of([] { join({}, nullptr); }), HasSubstr("needs a function"));
}

// Modules of all shapes that as_stage takes.
struct PairImpl : torch::nn::Module {
  std::pair<Tensor, Tensor> forward(const Tensor& a, Tensor b) { return {a + b, a - b}; }
};
TORCH_MODULE(Pair);
struct ListImpl : torch::nn::Module {
  Tensors forward(const Tensors& x) { return {x.back(), x.front()}; }
};
struct ListByValueImpl : torch::nn::Module {
  Tensor forward(Tensors x) { return torch::stack(x).sum(0); }
};
struct DefaultImpl : torch::nn::Module {
  std::tuple<Tensor> forward(Tensor a, Tensor b = {}, bool flag = true) { return flag && b.defined() ? a * b : a * 2; }
};

TEST(AsStage, ModuleHolder) {
  torch::nn::Linear linear(4, 2);
  const Stage stage = as_stage(linear);
  EXPECT_EQ(stage.module(), linear.ptr());
  EXPECT_THAT(stage.node_names(), testing::ElementsAre("forward"));
  const Tensor x = torch::randn({3, 4});
  EXPECT_TRUE(torch::equal(stage.forward({x}, context()).outputs().at(0), linear(x)));
  EXPECT_EQ(error_of([&] { stage.forward({x, x}, context(2)); }), "stage 2 takes 1 tensor, got 2 (micro-batch 5)");
}

TEST(AsStage, Sequential) {
  torch::nn::Sequential one(torch::nn::Linear(4, 8), torch::nn::GELU(), torch::nn::Linear(8, 2));
  const Tensor x = torch::randn({3, 4});
  EXPECT_TRUE(torch::equal(as_stage(one).forward({x}, context()).outputs().at(0), one->forward(x)));
  torch::nn::Sequential two(torch::nn::Bilinear(4, 4, 2), torch::nn::Tanh());
  EXPECT_TRUE(torch::equal(as_stage(two).forward({x, x}, context()).outputs().at(0), two->forward(x, x)));
}

TEST(AsStage, PointerAndTensorLists) {
  const Tensor a = random({2}), b = random({2}), c = random({2});
  const auto listed = as_stage(std::make_shared<ListImpl>()).forward({a, b, c}, context()).outputs();
  ASSERT_EQ(listed.size(), 2U);
  EXPECT_TRUE(listed[0].is_alias_of(c));
  EXPECT_TRUE(listed[1].is_alias_of(a));
  EXPECT_TRUE(torch::allclose(
      as_stage(std::make_shared<ListByValueImpl>()).forward({a, b, c}, context()).outputs().at(0), a + b + c));
}

TEST(AsStage, PairsTuplesAndDefaultArguments) {
  const Tensor a = random({2}), b = random({2});
  const Stage pair = as_stage(Pair());
  const auto sums = pair.forward({a, b}, context()).outputs();
  ASSERT_EQ(sums.size(), 2U);
  EXPECT_TRUE(torch::equal(sums[1], a - b));
  EXPECT_THAT(error_of([&] { pair.forward({a}, context()); }), HasSubstr("takes 2 tensors, got 1"));

  const Stage with_default = as_stage(std::make_shared<DefaultImpl>());
  EXPECT_TRUE(torch::equal(with_default.forward({a}, context()).outputs().at(0), a * 2));
  EXPECT_TRUE(torch::equal(with_default.forward({a, b}, context()).outputs().at(0), a * b));
  EXPECT_THAT(error_of([&] { with_default.forward({a, b, a}, context(4)); }), HasSubstr("does not take 3 tensors"));

  const auto lstm =
      as_stage(torch::nn::LSTM(torch::nn::LSTMOptions(2, 3))).forward({torch::randn({4, 1, 2})}, context()).outputs();
  EXPECT_EQ(lstm.size(), 3U);  // output, and the pair of hidden states
  const auto attention = as_stage(torch::nn::MultiheadAttention(4, 2));
  const Tensor q = torch::randn({3, 1, 4});
  EXPECT_EQ(attention.forward({q, q, q}, context()).outputs().size(), 2U);
}

TEST(AsStage, RefusesEmptyModules) {
  EXPECT_THAT(error_of([] { as_stage(torch::nn::Linear(nullptr)); }), HasSubstr("empty holder"));
  EXPECT_THAT(error_of([] { as_stage(std::shared_ptr<ListImpl>()); }), HasSubstr("null pointer"));
}

}  // namespace
}  // namespace dualpipe
