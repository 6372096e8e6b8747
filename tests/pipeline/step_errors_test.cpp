// What user code throws in a step, wherever it does, is told on every rank of the world with its place in the schedule.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;

/// Two pipelines of four ranks. What the second one does fails there, on rank 5 of the world if it is stage 2 that does
/// with micro-batch 5; the first one waits.
class SecondPipeline {
 public:
  using Body = std::function<void(const std::shared_ptr<Communicator>&)>;
  /// @return  what each rank of the world says, by rank.
  static std::vector<std::string> texts(const Body& body) {
    std::vector<std::string> said(2 * kRanks);
    run_ranks(2 * kRanks, [&](std::shared_ptr<Communicator> world) {
      const auto comm = world->split(world->rank() / kRanks, world->rank());
      world->commit("");  // a barrier could hear of the failure that follows
      std::string& text = said[world->rank()];
      if (world->rank() >= kRanks) text = message_of([&] { body(comm); });
      const std::string heard = message_of([&] { world->barrier().wait(); });
      if (text.empty()) text = heard;
    });
    return said;
  }
};

/// Throws `what` in stage 2 with micro-batch 5.
StageFactory throwing(const std::function<void(const at::Tensor& x, const StageContext&)>& at) {
  return [at](int number) {
    Layer module(number);
    return Stage(module).compute("layer", [=](const Tensors& x, const StageContext& context) mutable {
      if (context.stage != 2 || context.micro_batch != 5) return Tensors{module->forward(x[0])};
      const at::Tensor input = x[0] * 1;
      at(input, context);
      return Tensors{module->forward(input)};
    });
  };
}

void step(const std::shared_ptr<Communicator>& comm, const StageFactory& factory,
          const std::shared_ptr<Observer>& observer = nullptr) {
  DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, factory);
  if (observer && comm->rank() == 1) pipe->add_observer(observer);
  try {
    pipe->step(random_batch(16, 3), squared_error());
  } catch (const InvalidArgument&) {
    ADD_FAILURE() << "the caller cannot go on";
    throw;
  }
}

void expect_everywhere(const std::vector<std::string>& texts, const ::testing::Matcher<std::string>& matcher) {
  for (const std::string& text : texts) EXPECT_THAT(text, matcher);
}

const ::testing::Matcher<std::string> names_the_place =
    AllOf(HasSubstr("rank 5: "), HasSubstr("of stage 2"), HasSubstr("micro-batch 5: "),
          ContainsRegex("\nrank 5 .*<-- here"), HasSubstr("rank 5 did last, in step 0:"), HasSubstr("began  compute"));

TEST(StepErrors, OfAForward) {
  const auto texts = SecondPipeline::texts([](const auto& comm) {
    step(comm, throwing([](const at::Tensor&, const StageContext&) { throw std::runtime_error("no heads"); }));
  });
  expect_everywhere(texts, AllOf(names_the_place, HasSubstr("forward of stage 2, micro-batch 5: no heads")));
}

TEST(StepErrors, OfLibTorchInAForwardHaveNoBacktrace) {
  const auto texts = SecondPipeline::texts([](const auto& comm) {
    step(comm, throwing([](const at::Tensor& x, const StageContext&) { x.matmul(torch::ones({1, 1}, f64())); }));
  });
  expect_everywhere(texts, AllOf(names_the_place, HasSubstr("mat1 and mat2"), ::testing::Not(HasSubstr("frame #"))));
}

TEST(StepErrors, OfATensorHook) {
  const auto texts = SecondPipeline::texts([](const auto& comm) {
    step(comm, throwing([](const at::Tensor& x, const StageContext&) {
           x.register_hook([](const at::Tensor&) -> at::Tensor { throw std::runtime_error("not finite"); });
         }));
  });
  expect_everywhere(texts, AllOf(names_the_place, ContainsRegex("backward of stage 2, micro-batch 5: .*not finite")));
}

TEST(StepErrors, OfAHookOfAWeight) {
  const auto texts = SecondPipeline::texts([](const auto& comm) {
    step(comm, [](int number) {
      Layer module(number);
      return Stage(module).compute("layer", [=](const Tensors& x, const StageContext& context) mutable {
        const at::Tensor weight = module->weight * 1;
        if (context.stage == 2 && context.micro_batch == 5)
          weight.register_hook([](const at::Tensor&) -> at::Tensor { throw std::runtime_error("too large"); });
        return Tensors{x[0] + torch::tanh(x[0].matmul(weight))};
      });
    });
  });
  expect_everywhere(texts, AllOf(names_the_place, ContainsRegex("backward of stage 2, micro-batch 5: .*too large")));
}

TEST(StepErrors, ThatAreNoExceptions) {
  const std::vector<std::pair<std::function<void()>, std::string>> thrown{
      {[] { throw 42; }, "an exception that is no std::exception: 42"},
      {[] { throw std::string("out of patience"); }, "out of patience"},
      {[] { throw "out of patience"; }, "out of patience"},
      {[] { throw std::vector<int>(); }, "an exception that is no std::exception"},
      {[] { throw std::runtime_error(""); }, "an exception without a text"},
  };
  for (const auto& [bad, text] : thrown) {
    SCOPED_TRACE(text);
    const auto texts = SecondPipeline::texts([&, &raise = bad](const auto& comm) {
      step(comm, throwing([&](const at::Tensor&, const StageContext&) { raise(); }));
    });
    expect_everywhere(texts, AllOf(names_the_place, HasSubstr(text)));
  }
}

TEST(StepErrors, ThatAreNoExceptionsInABackward) {
  const auto texts = SecondPipeline::texts([](const auto& comm) {
    step(comm, throwing([](const at::Tensor& x, const StageContext&) {
           x.register_hook([](const at::Tensor&) -> at::Tensor { throw 42; });
         }));
  });
  expect_everywhere(texts, AllOf(names_the_place, ContainsRegex("backward of stage 2, micro-batch 5: .*: 42")));
}

TEST(StepErrors, OfALoss) {
  const auto texts = SecondPipeline::texts([](const auto& comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, [](int stage) { return Layer(stage); });
    pipe->step(random_batch(16, 3), [&](const Tensors& outputs, const Tensors& targets) {
      if (comm->rank() == 0) throw 42;
      return torch::mse_loss(outputs[0], targets[0]);
    });
  });
  expect_everywhere(texts, AllOf(ContainsRegex("rank 4: forward of stage 3, micro-batch [4-7]: .*: 42"),
                                 ContainsRegex("\nrank 4 .*<-- here")));
}

TEST(StepErrors, OfAFactory) {
  const auto texts = SecondPipeline::texts([](const auto& comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, [&](int stage) {
      if (stage == 2 && comm->rank() == 1) throw 42;
      return Layer(stage);
    });
  });
  for (int rank = kRanks; rank < 2 * kRanks; ++rank)
    EXPECT_THAT(texts[rank], ::testing::StartsWith("rank 5: the factory of stage 2 threw: an exception that is no"));
}

/// Throws when it is told of what `matches`.
class AngryObserver final : public Observer {
 public:
  explicit AngryObserver(std::function<bool(const Interval&)> matches) : matches_(std::move(matches)) {}
  void begin(std::int64_t) override {
    if (!matches_) throw 42;
  }
  void record(const Interval& interval) override {
    if (matches_ && matches_(interval)) throw std::runtime_error("the disk is full");
  }

 private:
  std::function<bool(const Interval&)> matches_;
};

TEST(StepErrors, OfAnObserver) {
  const auto texts_of = [](const std::function<bool(const Interval&)>& matches) {
    return SecondPipeline::texts([&](const auto& comm) {
      step(comm, [](int stage) { return Layer(stage); }, std::make_shared<AngryObserver>(matches));
    });
  };
  const auto about = [](Lane lane, Op op) {
    return [=](const Interval& interval) {
      return interval.lane == lane && (interval.step.op == op || interval.step.overlapped == op);
    };
  };
  expect_everywhere(texts_of(nullptr), HasSubstr("rank 5: an observer threw at the beginning of step 0: an exception "
                                                 "that is no std::exception: 42"));
  expect_everywhere(
      texts_of(about(Lane::compute, {Pass::Forward, 2, 5})),
      AllOf(names_the_place, HasSubstr("an observer threw when it was told of"), HasSubstr(": the disk is full")));
  for (const auto& [lane, what] : {std::pair(Lane::send, "outputs of stage 2 for micro-batch 5"),
                                   std::pair(Lane::receive, "outputs of stage 1 for micro-batch 5")})
    expect_everywhere(texts_of(about(lane, {Pass::Forward, lane == Lane::send ? 2 : 1, 5})),
                      AllOf(HasSubstr(std::string("rank 5: ") + what + ": an observer threw when it was told of"),
                            HasSubstr(": the disk is full"), ContainsRegex("\nrank 5 .*<-- here")));
}

/// What an optimizer throws is the user's. A rank that unwinds because of it is missed by the others.
TEST(StepErrors, OutsideOfAStepAreHeardOfWhenTheRankIsGone) {
  std::vector<std::string> texts(kRanks);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    texts[comm->rank()] = message_of([&] {
      DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, [](int stage) { return Layer(stage); });
      pipe->step(random_batch(16, 3), squared_error());
      if (comm->rank() == 1) throw std::runtime_error("learning rate of NaN");
      pipe->step(random_batch(16, 3), squared_error());
    });
  });
  EXPECT_EQ(texts[1], "learning rate of NaN");
  for (const int rank : {0, 2, 3}) EXPECT_THAT(texts[rank], HasSubstr("rank 1 has left")) << rank;
}

/// Errors of the caller name ranks of the world too.
TEST(StepErrors, OfTheCallerInTheSecondPipeline) {
  const Batch good = random_batch(16, 3);
  const auto texts_of = [&](const std::function<void(DualPipe&, bool)>& call) {
    std::string text;
    const auto texts = SecondPipeline::texts([&](const auto& comm) {
      DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, [](int stage) { return Layer(stage); });
      call(pipe, comm->rank() == 3);
    });
    for (int rank = kRanks; rank < 2 * kRanks; ++rank) {
      EXPECT_EQ(texts[rank], texts[kRanks]);
      text = texts[rank];
    }
    EXPECT_THAT(text, ::testing::Not(ContainsRegex("rank [0-3]")));
    return text;
  };
  EXPECT_THAT(texts_of([&](DualPipe& pipe, bool odd) {
                if (odd) {
                  pipe->predict(good);
                } else {
                  pipe->step(good, squared_error());
                }
              }),
              HasSubstr("rank 4 calls step(), rank 7 calls predict()"));
  EXPECT_THAT(texts_of([&](DualPipe& pipe, bool odd) {
                pipe->evaluate(Batch::from_micro_batches(split_batch(good, odd ? 4 : 8, 0)), squared_error());
              }),
              HasSubstr("that of rank 4 has 8 micro-batches, that of rank 7 has 4"));
  EXPECT_THAT(
      texts_of([&](DualPipe& pipe, bool odd) { pipe->step(odd ? random_batch(16, 4) : good, squared_error()); }),
      HasSubstr("inputs of rank 7 has other sizes or values, or others that require grad, than that of rank 4"));
  EXPECT_THAT(texts_of([&](DualPipe& pipe, bool odd) { pipe->step(odd ? Batch() : good, squared_error()); }),
              HasSubstr("rank 7: rank 7 got an empty batch"));
  EXPECT_THAT(texts_of([&](DualPipe& pipe, bool odd) { pipe->step(good, odd ? LossFn(nullptr) : squared_error()); }),
              HasSubstr("rank 7 computes the loss but got no loss function"));
  EXPECT_THAT(
      texts_of([&](DualPipe& pipe, bool odd) {
        Batch batch = good;
        if (odd) batch.targets.clear();
        pipe->step(batch, squared_error());
      }),
      HasSubstr("rank 7 got a batch without targets, but it computes the loss of some micro-batches, and rank 4"));
  EXPECT_THAT(texts_of([&](DualPipe& pipe, bool odd) {
                for (auto& parameter : pipe->parameters()) parameter.set_requires_grad(!odd);
                pipe->step(good, squared_error());
              }),
              HasSubstr("ranks 4 and 7 hold the same stages"));
  EXPECT_THAT(texts_of([&](DualPipe& pipe, bool odd) { pipe->clip_grad_norm_(odd ? -1.0 : 1.0); }),
              HasSubstr("rank 7: clip_grad_norm_ needs max_norm >= 0"));
}

TEST(StepErrors, OptionsThatDifferInTheSecondPipeline) {
  const auto texts = SecondPipeline::texts([&](const auto& comm) {
    DualPipe pipe(comm, {.num_micro_batches = comm->rank() == 2 ? 16 : 8}, [](int stage) { return Layer(stage); });
  });
  for (int rank = kRanks; rank < 2 * kRanks; ++rank)
    EXPECT_THAT(texts[rank],
                AllOf(HasSubstr("\n  rank 4: num_micro_batches 8"), HasSubstr("\n  rank 6: num_micro_batches 16")));
}

}  // namespace
}  // namespace dualpipe::test
