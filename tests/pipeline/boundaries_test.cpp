// What user code may do at the boundaries of a stage: each as in one process, compared with one process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <string>

#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

/// Trains one step with every kind of placement (mirrored, folded, straight) and compares with one process.
void expect_as_in_one_process(const Model& model, Batch batch = random_batch(16, 31),
                              const LossFn& loss = squared_error()) {
  for (const std::string kind : {"dualpipe", "dualpipev", "1f1b"}) {
    for (const Publish publish : {Publish::early, Publish::atomic}) {
      SCOPED_TRACE(kind);
      const int num_stages = kind == "dualpipev" ? 2 * kRanks : kRanks;
      const Reference expected = reference(model, num_stages, batch, kMicroBatches, loss, 1.0 / kMicroBatches);
      run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
        DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches, .schedule = kind, .publish = publish},
                      as_factory(model));
        const Tensors before{batch.inputs[0].clone()};
        // What travels is contiguous, so a sum may be rounded in another order than where it was a view.
        const auto near = ::testing::Pointwise(::testing::DoubleNear(1e-13), expected.losses);
        EXPECT_THAT(pipe->step(batch, loss).micro_batch_losses(), near);
        EXPECT_TRUE(torch::equal(before[0], batch.inputs[0])) << "the caller's batch was written to";
        expect_gradients(pipe, expected);
        EXPECT_THAT(pipe->evaluate(batch, loss).micro_batch_losses(), near);
      });
    }
  }
}

TEST(Boundaries, OutputsThatAreViews) {
  expect_as_in_one_process([](int stage) {
    Layer module(stage);
    return Piece{module.ptr(), [module](const Tensors& x) mutable {
                   const auto wide = torch::cat({module->forward(x[0]), x[0] * 2}, 1);
                   return Tensors{wide.narrow(1, 0, kWidth)};
                 }};
  });
}

TEST(Boundaries, TransposedOutputs) {
  const Model model = [](int stage) {
    Layer module(stage);
    return Piece{module.ptr(), [module, stage](const Tensors& x) mutable {
                   return Tensors{module->forward(stage == 0 ? x[0] : x[0].t()).t()};
                 }};
  };
  expect_as_in_one_process(model, random_batch(16, 31), [](const Tensors& outputs, const Tensors& targets) {
    return torch::mse_loss(outputs[0].t(), targets[0]);
  });
}

TEST(Boundaries, AStageThatReturnsItsInput) {
  expect_as_in_one_process([](int stage) {
    if (stage % 2 == 1) return Piece{nullptr, [](const Tensors& x) { return x; }};
    return layer(stage);
  });
}

TEST(Boundaries, OneTensorReturnedTwice) {
  expect_as_in_one_process([](int stage) {
    Layer module(stage);
    return Piece{module.ptr(), [module](const Tensors& x) mutable {
                   const auto y = module->forward(x.size() == 2 ? x[0] + 0.5 * x[1] : x[0]);
                   return Tensors{y, y};
                 }};
  });
}

/// Stages hand on what `outputs` makes of a layer's result; stage `writer` doubles its input `written` in place.
Model sharing_model(const std::function<Tensors(const at::Tensor& y, const Tensors& x)>& outputs, int writer,
                    int written) {
  return [=](int stage) {
    Layer module(stage);
    return Piece{module.ptr(), [=](const Tensors& x) mutable {
                   if (stage == writer) x[static_cast<std::size_t>(written)].mul_(2);
                   at::Tensor sum = x[0] + 1;
                   for (std::size_t i = 1; i < x.size(); ++i) sum = sum + 0.5 * torch::tanh(0.1 * x[i].sum());
                   return outputs(module->forward(sum), x);
                 }};
  };
}

TEST(Boundaries, ReadingOutputsThatShareMemory) {
  const auto slices = [](const at::Tensor& y, const Tensors&) { return Tensors{y, y.narrow(1, 1, 2), y.t().t()}; };
  expect_as_in_one_process(sharing_model(slices, -1, 0));
  expect_as_in_one_process(
      sharing_model([](const at::Tensor& y, const Tensors&) { return Tensors{y, y.detach()}; }, -1, 0));
  // What looks like the note about shared memory behind the activations is the stage's own.
  expect_as_in_one_process(sharing_model(
      [](const at::Tensor& y, const Tensors&) { return Tensors{y, torch::empty({0, 1, 0}, torch::kByte)}; }, -1, 0));
}

TEST(Boundaries, WritingIntoOutputsThatShareNoElement) {
  const auto halves = [](const at::Tensor& y, const Tensors&) {
    const at::Tensor wide = torch::cat({y, y * 3}, 1);
    return Tensors{wide.narrow(1, 0, kWidth), wide.narrow(1, kWidth, kWidth)};
  };
  for (const int written : {0, 1}) expect_as_in_one_process(sharing_model(halves, 2, written));
}

TEST(Boundaries, WritingIntoOutputsThatShareMemoryIsAnError) {
  struct Case {
    std::string name;
    std::function<Tensors(const at::Tensor& y, const Tensors& x)> outputs;
    int writer;
    int written;
    std::string text;
  };
  // Of four stages: 1 and 2 are on one rank with dualpipev on two ranks, others are not.
  std::vector<Case> cases;
  for (const int writer : {1, 2, 3}) {
    const std::string name = " into stage " + std::to_string(writer);
    cases.push_back({"one tensor twice" + name, [](const at::Tensor& y, const Tensors&) { return Tensors{y, y}; },
                     writer, 1, "into tensor 0 or 1 of those"});
    cases.push_back({"a tensor and its view" + name,
                     [](const at::Tensor& y, const Tensors&) { return Tensors{y, y * 2, y.narrow(1, 2, 2)}; }, writer,
                     0, "into tensor 0 or 2 of those"});
  }
  cases.push_back({"handed on by a stage between",
                   [](const at::Tensor& y, const Tensors& x) { return x.size() == 1 ? Tensors{y, y} : x; }, 2, 1,
                   "into tensor 0 or 1 of those"});
  for (const Case& each : cases) {
    SCOPED_TRACE(each.name);
    for (const bool trains : {true, false}) {
      std::atomic<int> named{0};
      run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
        DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 4, .schedule = "dualpipev"},
                      as_factory(sharing_model(each.outputs, each.writer, each.written)));
        const std::string message = message_of([&] {
          if (trains)
            pipe->step(random_batch(8, 1), squared_error());
          else
            pipe->evaluate(random_batch(8, 1), squared_error());
        });
        EXPECT_THAT(message, AllOf(HasSubstr("stage " + std::to_string(each.writer) + " writes in place "),
                                   HasSubstr(each.text), HasSubstr("clone()")));
        for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
        if (!message.empty()) ++named;
      });
      EXPECT_EQ(named, 2);
    }
  }
}

TEST(Boundaries, WritingIntoAParameterThatAStageReturnsIsAnError) {
  std::atomic<int> named{0};
  run_ranks(1, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 2, .schedule = "dualpipev"}, as_factory([](int stage) {
                    Layer module(stage);
                    return Piece{module.ptr(), [module, stage](const Tensors& x) mutable {
                                   if (stage == 0) return Tensors{module->forward(x[0]), module->weight};
                                   x[1].mul_(2);
                                   return Tensors{module->forward(x[0]).matmul(x[1])};
                                 }};
                  }));
    const at::Tensor before = pipe->parameters()[0].detach().clone();
    EXPECT_THAT(message_of([&] { pipe->step(random_batch(4, 1), squared_error()); }),
                AllOf(HasSubstr("stage 1 writes in place into tensor 1"), HasSubstr("a parameter")));
    ++named;
  });
  EXPECT_EQ(named, 1);
}

TEST(Boundaries, OutputsKeptByTheModule) {
  struct Keeper : torch::nn::Module {
    explicit Keeper(int stage) : layer(register_module("layer", Layer(stage))) {}
    Layer layer;
    torch::Tensor kept;
  };
  expect_as_in_one_process([](int stage) {
    auto module = std::make_shared<Keeper>(stage);
    return Piece{module, [module](const Tensors& x) {
                   module->kept = module->layer->forward(x[0]);
                   return Tensors{module->kept};
                 }};
  });
}

TEST(Boundaries, InPlaceCodeAtAStagesStart) {
  expect_as_in_one_process([](int stage) {
    Layer module(stage);
    return Piece{module.ptr(), [module](const Tensors& x) mutable {
                   auto y = x[0];
                   y.mul_(0.9).add_(0.1);
                   return Tensors{module->forward(y)};
                 }};
  });
}

TEST(Boundaries, IntegersAndTensorsWithoutGradientTravel) {
  Batch batch = random_batch(16, 31);
  batch.inputs.push_back(torch::arange(16).remainder(3));
  expect_as_in_one_process(
      [](int stage) {
        Layer module(stage);
        return Piece{module.ptr(), [module](const Tensors& x) mutable {
                       // A float without gradient and an integer ride along; both are used on the way.
                       const auto scale = (x[1] + 1).to(torch::kDouble).unsqueeze(1);
                       const auto ride = x.size() > 2 ? x[2] : torch::full({1}, 0.25, f64());
                       return Tensors{module->forward(x[0] * scale / 2 + ride), x[1], ride};
                     }};
      },
      batch);
}

TEST(Boundaries, UndefinedTensorsArriveUndefined) {
  std::atomic<int> seen{0};
  expect_as_in_one_process([&seen](int stage) {
    Layer module(stage);
    return Piece{module.ptr(), [module, &seen](const Tensors& x) mutable {
                   if (x.size() == 2 && !x[1].defined()) ++seen;
                   return Tensors{module->forward(x[0]), torch::Tensor()};
                 }};
  });
  EXPECT_GT(seen, 0);
}

TEST(Boundaries, AGradientThatNobodyAsksForTravelsAsZeros) {
  // The second tensor requires grad, and the next stage does not use it.
  expect_as_in_one_process([](int stage) {
    Layer module(stage);
    return Piece{module.ptr(), [module](const Tensors& x) mutable {
                   const auto y = module->forward(x[0]);
                   return Tensors{y, y * 3};
                 }};
  });
}

TEST(Boundaries, FrozenStagesAndParameters) {
  expect_as_in_one_process([](int stage) {
    Layer module(stage);
    if (stage < 2)  // nothing before stage 2 asks for a gradient
      for (auto& parameter : module->parameters()) parameter.set_requires_grad(false);
    if (stage == 3) module->bias.set_requires_grad(false);
    return Piece{module.ptr(), [module](const Tensors& x) mutable { return Tensors{module->forward(x[0])}; }};
  });
}

TEST(Boundaries, FrozenParametersOfTypesWithoutArithmetic) {
  // Quantized weights of a fine-tuned model: holders have copies of them, and nothing to sum.
  struct Quantized : torch::nn::Module {
    explicit Quantized(int stage) : layer(register_module("layer", Layer(stage))) {
      const auto values = (seeded({kWidth}, 50 + stage).abs() * 8).floor();
      bytes = register_parameter("bytes", values.to(torch::kUInt16), /*requires_grad=*/false);
      floats = register_parameter("floats", values.to(torch::kFloat8_e4m3fn), /*requires_grad=*/false);
    }
    torch::Tensor forward(const torch::Tensor& x) {
      return layer->forward(x) + bytes.to(torch::kDouble) - floats.to(torch::kDouble);
    }
    Layer layer{nullptr};
    torch::Tensor bytes, floats;
  };
  expect_as_in_one_process([](int stage) {
    auto module = std::make_shared<Quantized>(stage);
    return Piece{module, [module](const Tensors& x) { return Tensors{module->forward(x[0])}; }};
  });
}

TEST(Boundaries, ATensorWithoutDimensionCrosses) {
  expect_as_in_one_process(
      [](int stage) {
        Layer module(stage);
        return Piece{module.ptr(), [module](const Tensors& x) mutable {
                       // An auxiliary loss travels along.
                       const auto y = module->forward(x[0]);
                       const auto more = y.square().mean() * 0.1;
                       return Tensors{y, x.size() == 2 ? x[1] + more : more};
                     }};
      },
      random_batch(16, 31),
      [](const Tensors& outputs, const Tensors& targets) {
        return torch::mse_loss(outputs[0], targets[0]) + outputs[1];
      });
}

TEST(Boundaries, UnevenMicroBatchesAndExtras) {
  std::vector<Batch> parts;
  for (int m = 0; m < kMicroBatches; ++m) {
    parts.push_back(random_batch(1 + m % 3, 100 + m));
    parts.back().extras = {torch::full({1}, 0.1 * m, f64())};
  }
  const Batch batch = Batch::from_micro_batches(parts);
  std::vector<Layer> model;
  for (int s = 0; s < kRanks; ++s) model.emplace_back(s);
  std::vector<double> losses;
  for (const Batch& part : parts) {
    auto x = part.inputs[0];
    for (auto& module : model) x = module->forward(x + part.extras[0]);
    const auto loss = torch::mse_loss(x, part.targets[0]);
    losses.push_back(loss.item<double>());
    (loss / kMicroBatches).backward();
  }
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, [](int number) {
      Layer module(number);
      return Stage(module.ptr()).compute("layer", [module](const Tensors& x, const StageContext& context) mutable {
        EXPECT_EQ(context.extras.size(), 1u);
        EXPECT_TRUE(context.training);
        return Tensors{module->forward(x[0] + context.extras[0])};
      });
    });
    EXPECT_EQ(pipe->step(batch, squared_error()).micro_batch_losses(), losses);
    for (const int stage : pipe->local_stages())
      for (const auto& item : pipe->named_children()["stage" + std::to_string(stage)]->named_parameters())
        EXPECT_LE(difference(item.value().grad(), model[stage]->named_parameters()[item.key()].grad()), 1e-12);
  });
}

TEST(Boundaries, WritingIntoExtrasIsAnError) {
  Batch batch = random_batch(16, 1);
  batch.extras = {torch::ones({16, 1}, f64())};
  run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 4, .schedule = "dualpipev"}, [](int number) {
      Layer module(number);
      return Stage(module).compute("layer", [=](const Tensors& x, const StageContext& context) mutable {
        at::Tensor mask = context.extras[0];
        return module->forward(x[0] * (number == 2 ? mask.mul_(0.5) : mask));
      });
    });
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }),
                HasSubstr("stage 2 writes in place into its extras"));
  });
}

TEST(Boundaries, ModulesSharedByTheStagesOfARankCountOnce) {
  // First and last stage share one layer, as tied embeddings do; with DualPipe both live on ranks 0 and P-1.
  const Batch batch = random_batch(16, 8);
  Layer tied(0), second(1), third(2);
  for (const Batch& part : split_batch(batch, kMicroBatches, 0)) {
    const auto y = tied->forward(third->forward(second->forward(tied->forward(part.inputs[0]))));
    (torch::mse_loss(y, part.targets[0]) / kMicroBatches).backward();
  }
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    Layer shared(0);
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, [&](int number) {
      Layer module = number == 0 || number == 3 ? shared : Layer(number);
      return Stage(module.ptr()).compute("layer", [module](const Tensors& x, const StageContext&) mutable {
        return Tensors{module->forward(x[0])};
      });
    });
    EXPECT_EQ(pipe->parameters().size(), comm->rank() == 0 || comm->rank() == 3 ? 2u : 4u);
    pipe->step(batch, squared_error());
    if (comm->rank() == 0 || comm->rank() == 3) {
      EXPECT_LE(difference(shared->weight.grad(), tied->weight.grad()), 1e-12);
      EXPECT_LE(difference(shared->bias.grad(), tied->bias.grad()), 1e-12);
    }
    double squares = 0;
    for (const auto& module : {tied, second, third})
      for (const auto& parameter : module->parameters()) squares += parameter.grad().square().sum().item<double>();
    EXPECT_NEAR(pipe->clip_grad_norm_(1e9).item<double>(), std::sqrt(squares), 1e-12);
  });
}

TEST(Boundaries, ParameterHooksRunOncePerMicroBatch) {
  std::vector<std::atomic<int>> calls(kRanks);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(
        comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, as_factory([&](int stage) {
          Piece piece = layer(stage);
          piece.module->named_parameters()["weight"].register_hook([&calls, stage](const torch::Tensor& gradient) {
            ++calls[stage];
            return gradient;
          });
          return piece;
        }));
    pipe->step(random_batch(16, 2), squared_error());
  });
  for (const auto& count : calls) EXPECT_EQ(count, kMicroBatches);
}

TEST(Boundaries, RunningStatisticsAreEqualOnHolders) {
  std::vector<at::Tensor> means(kRanks);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, as_factory([](int stage) {
                    torch::nn::BatchNorm1d norm(kWidth);
                    norm->to(torch::kDouble);
                    const Piece inner = layer(stage);
                    struct Both : torch::nn::Module {};
                    auto both = std::make_shared<Both>();
                    both->register_module("norm", norm.ptr());
                    both->register_module("layer", inner.module);
                    return Piece{
                        both, [norm, inner](const Tensors& x) mutable { return inner.forward({norm->forward(x[0])}); }};
                  }));
    pipe->step(random_batch(32, 2), squared_error());
    Tensors buffers;
    for (const auto& buffer : pipe->buffers())
      if (buffer.is_floating_point()) buffers.push_back(buffer.reshape({-1}).clone());
    means[comm->rank()] = torch::cat(buffers);
    pipe->eval();
    pipe->evaluate(random_batch(32, 2), squared_error());
    EXPECT_FALSE(pipe->is_training());
  });
  for (int rank = 0; rank < kRanks; ++rank) EXPECT_TRUE(torch::equal(means[rank], means[kRanks - 1 - rank]));
  EXPECT_GT(means[0].abs().max().item<double>(), 0);
}

TEST(Boundaries, StagesThatDoNotSplitTheirBackward) {
  const Batch batch = random_batch(16, 3);
  const Reference expected = reference(layer, kRanks, batch, kMicroBatches, squared_error(), 1.0 / kMicroBatches);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches},
                  [](int number) { return as_factory(layer)(number).split_backward(number % 2 == 0); });
    pipe->step(batch, squared_error());
    expect_gradients(pipe, expected);
  });
}

}  // namespace
}  // namespace dualpipe::test
