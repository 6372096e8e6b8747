// A step commits on all ranks or leaves gradients and parameters as they were.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <string>

#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;

DualPipe make_pipe(const std::shared_ptr<Communicator>& comm, const Model& model = layer) {
  return DualPipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, as_factory(model));
}

Reference expected_of(const Batch& batch) {
  return reference(layer, kRanks, batch, kMicroBatches, squared_error(), 1.0 / kMicroBatches);
}

TEST(Transaction, StepsAccumulateWithoutCountingTwice) {
  const Batch batch = random_batch(16, 3);
  const Reference expected = expected_of(batch);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    for (int step = 1; step <= 3; ++step) {
      pipe->step(batch, squared_error());
      expect_gradients(pipe, expected, 1e-12, step);
    }
  });
}

TEST(Transaction, AddsToGradientsThatTheUserPutThereInTheSameTensors) {
  const Batch batch = random_batch(16, 3);
  const Reference expected = expected_of(batch);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    Tensors own;
    for (auto& parameter : pipe->parameters()) {
      own.push_back(torch::ones_like(parameter));
      parameter.mutable_grad() = own.back();
    }
    pipe->step(batch, squared_error());
    std::size_t i = 0;
    for (const auto& child : pipe->named_children())
      for (const auto& item : child.value()->named_parameters()) {
        EXPECT_TRUE(item.value().grad().is_same(own[i]));
        const auto truth = expected.gradients.at(std::stoi(child.key().substr(5))).at(item.key()) + 1;
        EXPECT_LE(difference(own[i++], truth), 1e-12);
      }
  });
}

TEST(Transaction, EvaluateTrainEvaluate) {
  const Batch batch = random_batch(16, 9);
  const Reference before = expected_of(batch);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    EXPECT_EQ(pipe->evaluate(batch, squared_error()).micro_batch_losses(), before.losses);
    const double loss = pipe->step(batch, squared_error()).loss.item<double>();
    torch::optim::SGD optimizer(pipe->parameters(), torch::optim::SGDOptions(0.05));
    optimizer.step();
    EXPECT_TRUE(pipe->is_training());
    const StepResult after = pipe->evaluate(batch, squared_error());
    EXPECT_TRUE(pipe->is_training());
    EXPECT_LT(after.loss.item<double>(), loss);
    expect_gradients(pipe, before);  // an evaluation leaves gradients alone
  });
}

TEST(Transaction, ThreeOptimizerStepsEqualOneProcess) {
  const Batch batch = random_batch(16, 21);
  // The same in one process.
  std::vector<Layer> model;
  Tensors all;
  for (int s = 0; s < kRanks; ++s) {
    model.emplace_back(s);
    for (auto& parameter : model.back()->parameters()) all.push_back(parameter);
  }
  torch::optim::AdamW reference_optimizer(all, torch::optim::AdamWOptions(0.01));
  std::vector<double> norms;
  for (int step = 0; step < 3; ++step) {
    reference_optimizer.zero_grad();
    for (const Batch& part : split_batch(batch, kMicroBatches, 0)) {
      auto x = part.inputs[0];
      for (auto& module : model) x = module->forward(x);
      (torch::mse_loss(x, part.targets[0]) / kMicroBatches).backward();
    }
    norms.push_back(torch::nn::utils::clip_grad_norm_(all, 0.05));
    reference_optimizer.step();
  }
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    torch::optim::AdamW optimizer(pipe->parameters(), torch::optim::AdamWOptions(0.01));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      pipe->step(batch, squared_error());
      const double norm = pipe->clip_grad_norm_(0.05).item<double>();
      EXPECT_NEAR(norm, norms[step], 1e-9 * norms[step]);
      EXPECT_GT(norm, 0.05);  // the test means to clip
      optimizer.step();
    }
    for (const int stage : pipe->local_stages()) {
      const auto mine = pipe->named_children()["stage" + std::to_string(stage)]->named_parameters();
      for (const auto& item : model[stage]->named_parameters())
        EXPECT_LE(difference(mine[item.key()], item.value()), 1e-9);
    }
  });
}

TEST(Transaction, TwoPipelinesShareACommunicator) {
  const Batch batch = random_batch(16, 5);
  const Reference expected = expected_of(batch);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe first = make_pipe(comm), second = make_pipe(comm);
    first->step(batch, squared_error());
    second->step(batch, squared_error());
    first->step(batch, squared_error());
    expect_gradients(first, expected, 1e-12, 2);
    expect_gradients(second, expected);
  });
}

// --- failures
// ---------------------------------------------------------------------------------------------------------------

/// Throws in one pass of one micro-batch of stage 2, once armed.
struct Bomb {
  std::atomic<bool> armed{false};
  std::string where;  // "forward" or "backward"
};

struct Fuse : torch::autograd::Function<Fuse> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x, std::int64_t bomb) {
    context->saved_data["bomb"] = bomb;
    return x.clone();
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list gradients) {
    auto* bomb = reinterpret_cast<Bomb*>(context->saved_data["bomb"].toInt());
    if (bomb->armed && bomb->where == "backward") throw std::runtime_error("boom in backward");
    return {gradients[0], torch::Tensor()};
  }
};

Model with_bomb(Bomb& bomb) {
  return [&bomb](int stage) {
    Piece piece = layer(stage);
    if (stage != 2) return piece;
    return Piece{piece.module, [&bomb, piece](const Tensors& inputs) {
                   if (bomb.armed && bomb.where == "forward") throw std::runtime_error("boom in forward");
                   return piece.forward({Fuse::apply(inputs[0], reinterpret_cast<std::int64_t>(&bomb))});
                 }};
  };
}

class FailingStep : public ::testing::TestWithParam<const char*> {};

TEST_P(FailingStep, EndsOnAllRanksAndChangesNothing) {
  const std::string where = GetParam();
  const Batch batch = random_batch(16, 3);
  std::mutex mutex;
  std::vector<std::string> messages(kRanks);
  Bomb bomb;
  bomb.where = where;
  const auto body = [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm, with_bomb(bomb));
    pipe->step(batch, squared_error());
    std::vector<at::Tensor> parameters, gradients, gradient_values;
    for (const auto& parameter : pipe->parameters()) {
      parameters.push_back(parameter.detach().clone());
      gradients.push_back(parameter.grad());
      gradient_values.push_back(parameter.grad().clone());
    }
    comm->barrier().wait();
    bomb.armed = true;
    const LossFn loss = [&](const Tensors& outputs, const Tensors& targets) {
      if (where == "loss" && comm->rank() == 0) throw std::runtime_error("boom in loss");
      return torch::mse_loss(outputs[0], targets[0]);
    };
    const std::string message = message_of([&] { pipe->step(batch, loss); });
    {
      const std::lock_guard lock(mutex);
      messages[comm->rank()] = message;
    }
    std::size_t i = 0;
    for (const auto& parameter : pipe->parameters()) {
      EXPECT_TRUE(torch::equal(parameter, parameters[i]));
      EXPECT_TRUE(parameter.grad().is_same(gradients[i]));
      EXPECT_TRUE(torch::equal(parameter.grad(), gradient_values[i++]));
    }
    // What follows fails at once, and says why.
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }), HasSubstr("boom in " + where));
  };
  run_ranks(kRanks, body);
  for (const std::string& message : messages) {
    EXPECT_THAT(message, HasSubstr("boom in " + where));
    EXPECT_THAT(message, ::testing::ContainsRegex("rank [0-3]: "));
    EXPECT_THAT(message, HasSubstr("micro-batch"));
  }

  // A new communicator and a new pipeline work.
  bomb.armed = false;
  const Reference expected = expected_of(batch);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm, with_bomb(bomb));
    pipe->step(batch, squared_error());
    expect_gradients(pipe, expected);
  });
}

INSTANTIATE_TEST_SUITE_P(Transaction, FailingStep, ::testing::Values("forward", "backward", "loss"),
                         [](const auto& parameter) { return std::string(parameter.param); });

/// A rank that fails right after a step reaches ranks that still wait in the vote of that step.
TEST(Transaction, AStepIsOverEverywhereOrNowhere) {
  const Batch batch = random_batch(16, 3);
  const Reference expected = expected_of(batch);
  for (int round = 0; round < 40 && !::testing::Test::HasFailure(); ++round) {
    SCOPED_TRACE(round);
    std::vector<int> over(kRanks);
    const auto body = [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe = make_pipe(comm);
      try {
        for (int& steps = over[comm->rank()];; ++steps) {
          if (steps == 2 && comm->rank() == round % kRanks) throw Error("a bad token");
          pipe->step(batch, squared_error());
        }
      } catch (const CommError&) {
        expect_gradients(pipe, expected, 1e-12, 2);
        throw;
      }
    };
    EXPECT_THAT(message_of([&] { run_ranks(kRanks, body); }), HasSubstr("a bad token"));
    EXPECT_THAT(over, ::testing::Each(2));
  }
}

TEST(Transaction, AnObserverThatThrowsEndsTheStepOnAllRanks) {
  struct Angry final : Observer {
    void record(const Interval& interval) override {
      if (interval.lane == Lane::compute && ++seen == 10) throw std::runtime_error("the disk is full");
    }
    int seen = 0;
  };
  const Batch batch = random_batch(16, 3);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    if (comm->rank() == 2) pipe->add_observer(std::make_shared<Angry>());
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }), HasSubstr("the disk is full"));
    for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
  });
}

TEST(Transaction, AnObserverThatThrowsAtTheBeginningEndsTheStepOnAllRanks) {
  struct Angry final : Observer {
    void begin(std::int64_t) override { throw std::runtime_error("no space for a trace"); }
  };
  const Batch batch = random_batch(16, 3);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    if (comm->rank() == 1) pipe->add_observer(std::make_shared<Angry>());
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }), HasSubstr("no space for a trace"));
    for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
  });
}

TEST(Transaction, WhatAnObserverThrowsAfterTheCommitIsThrownByTheNextCall) {
  struct Angry final : Observer {
    void end(bool committed) override {
      if (committed && ++ended == 2) throw std::runtime_error("the disk is full");
    }
    int ended = 0;
  };
  struct Counter final : Observer {
    void end(bool committed) override { ended += committed ? 1 : 0; }
    int ended = 0;
  };
  const Batch batch = random_batch(16, 3);
  const Reference expected = expected_of(batch);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    const auto counter = std::make_shared<Counter>();
    if (comm->rank() == 2) pipe->add_observer(std::make_shared<Angry>());
    pipe->add_observer(counter);
    for (int step = 1; step <= 2; ++step) {
      EXPECT_EQ(pipe->step(batch, squared_error()).micro_batch_losses(), expected.losses);
      expect_gradients(pipe, expected, 1e-12, step);
    }
    EXPECT_EQ(counter->ended, 2);
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }),
                ::testing::AllOf(HasSubstr("rank 2: "), HasSubstr("step 1"), HasSubstr("the disk is full")));
    expect_gradients(pipe, expected, 1e-12, 2);
    pipe->step(batch, squared_error());
    expect_gradients(pipe, expected, 1e-12, 3);
  });
}

TEST(Transaction, AddsToGradientsOfAnyLayout) {
  const Batch batch = random_batch(16, 3);
  const Reference expected = expected_of(batch);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    // A weight with a sparse gradient; one whose gradient is a slice of a buffer; an expanded one; one of another
    // dtype.
    auto parameters = pipe->parameters();
    ASSERT_EQ(parameters.size(), 4u);
    parameters[0].mutable_grad() = torch::ones_like(parameters[0]).to_sparse();
    const auto buffer = torch::ones({2 * kWidth}, f64());
    parameters[1].mutable_grad() = buffer.narrow(0, kWidth, kWidth);
    parameters[2].mutable_grad() = torch::ones({}, f64()).expand_as(parameters[2]);
    parameters[3].mutable_grad() = torch::ones_like(parameters[3]).to(torch::kFloat);
    const auto single = parameters[3].grad();
    pipe->step(batch, squared_error());
    std::size_t i = 0;
    for (const auto& child : pipe->named_children())
      for (const auto& item : child.value()->named_parameters()) {
        const auto truth = expected.gradients.at(std::stoi(child.key().substr(5))).at(item.key()) + 1;
        EXPECT_LE(difference(item.value().grad(), truth), i == 3 ? 1e-6 : 1e-12) << i;
        ++i;
      }
    EXPECT_TRUE(torch::equal(buffer.narrow(0, kWidth, kWidth), parameters[1].grad()));
    EXPECT_TRUE(torch::equal(buffer.narrow(0, 0, kWidth), torch::ones({kWidth}, f64())));
    EXPECT_TRUE(parameters[3].grad().is_same(single));
  });
}

TEST(Transaction, AGradientThatCannotBeAddedToEndsTheStepOnAllRanks) {
  const Batch batch = random_batch(16, 3);
  std::atomic<int> named{0};
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    pipe->step(batch, squared_error());
    auto parameters = pipe->parameters();
    if (comm->rank() == 1) parameters.back().mutable_grad() = torch::ones({2, 3}, f64());
    Tensors before, values;
    for (const auto& parameter : parameters) {
      before.push_back(parameter.grad());
      values.push_back(parameter.grad().clone());
    }
    const std::string message = message_of([&] { pipe->step(batch, squared_error()); });
    if (message.find("has sizes [2, 3]") != std::string::npos) ++named;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      EXPECT_TRUE(parameters[i].grad().is_same(before[i]));
      EXPECT_TRUE(torch::equal(parameters[i].grad(), values[i]));
    }
  });
  EXPECT_EQ(named, kRanks);
}

TEST(Transaction, ALossWithoutAGraphIsAnError) {
  std::atomic<int> named{0};
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm);
    const LossFn number = [](const Tensors& outputs, const Tensors& targets) {
      return torch::mse_loss(outputs[0].detach(), targets[0]);
    };
    pipe->evaluate(random_batch(16, 3), number);
    const std::string message = message_of([&] { pipe->step(random_batch(16, 3), number); });
    if (message.find("the loss has no graph") != std::string::npos) ++named;
    for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
  });
  EXPECT_EQ(named, kRanks);
}

TEST(Transaction, AFailedStepRestoresBuffers) {
  std::atomic<int> changed{0};
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = make_pipe(comm, [](int stage) {
      torch::nn::BatchNorm1d norm(kWidth);
      norm->to(torch::kDouble);
      const Piece inner = layer(stage);
      auto both = std::make_shared<torch::nn::Module>();
      both->register_module("norm", norm.ptr());
      both->register_module("layer", inner.module);
      return Piece{both, [norm, inner](const Tensors& x) mutable { return inner.forward({norm->forward(x[0])}); }};
    });
    pipe->step(random_batch(32, 2), squared_error());
    const auto buffers = pipe->buffers();
    Tensors before;
    for (const auto& buffer : buffers) before.push_back(buffer.clone());
    EXPECT_EQ(buffers.size(), 6u);  // two stages with mean, variance and a counter
    const LossFn loss = [&](const Tensors& outputs, const Tensors& targets) {
      for (std::size_t i = 0; i < buffers.size(); ++i)
        if (!torch::equal(buffers[i], before[i])) ++changed;
      if (changed > 6) throw std::runtime_error("boom in loss");
      return torch::mse_loss(outputs[0], targets[0]);
    };
    EXPECT_THAT(message_of([&] { pipe->step(random_batch(32, 3), loss); }), HasSubstr("boom in loss"));
    for (std::size_t i = 0; i < buffers.size(); ++i) EXPECT_TRUE(torch::equal(buffers[i], before[i])) << i;
  });
  EXPECT_GT(changed, 6);
}

TEST(Transaction, AFactoryThatThrowsFailsAllRanksInTheConstructor) {
  std::atomic<int> failed{0};
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    const auto message = message_of([&] {
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, [&](int stage) {
        if (comm->rank() == 3 && stage == 0) throw std::runtime_error("no weights for you");
        return as_factory(layer)(stage);
      });
    });
    EXPECT_THAT(message, HasSubstr("rank 3: the factory of stage 0 threw: no weights for you"));
    ++failed;
    // The communicator is still usable.
    DualPipe pipe = make_pipe(comm);
    pipe->step(random_batch(16, 1), squared_error());
  });
  EXPECT_EQ(failed, kRanks);
}

}  // namespace
}  // namespace dualpipe::test
