// What is expected need not be announced: receives begin without a word of the sender's host once the same has come
// before, and what comes is compared all the same.
#include <gmock/gmock.h>

#include <latch>

#include "lagging.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

const bool poisoned = [] {
  testing::poison_freed_memory();
  return true;
}();

// ---------------------------------------------------------------------------------------------------------------------
// one communicator

constexpr std::int64_t kElements = 500;

Signature floats(std::int64_t count) { return {{.dtype = at::kFloat, .sizes = {count}}}; }

/// Rank 1 has what it asks for in hand while the host of rank 0 has not said a word about it.
void run_ahead(const std::function<Pending(Communicator&, int round, const at::Tensor& made)>& call,
               const std::function<at::Tensor(Tensors)>& of_rank_0) {
  const testing::NcclEmulation emulation(2);
  std::latch taken(1);
  std::atomic<int> wrong{0};
  run_emulated(emulation, 2, {.timeout = 5s}, [&](const EmulatedRank& emulated) {
    const AsyncRank rank(emulated);
    rank->connect({{0, 1}});
    for (int round = 0; round < 2; ++round) {
      if (rank.rank() == 0 && round == 1) taken.wait();
      at::Tensor made = rank.empty({kElements});
      rank.run(slow_fill(made, [=](std::int64_t i) { return static_cast<float>(1000 * round + i); }, 300us));
      Pending pending = call(*rank, round, made);
      const at::Tensor got = rank.rank() == 1 ? of_rank_0(pending.take()) : (pending.wait(), at::Tensor());
      if (rank.rank() == 0) continue;
      if (round == 1) taken.count_down();
      rank.run([&wrong, got, round] {
        for (std::int64_t i = 0; i < kElements; ++i)
          if (got.const_data_ptr<float>()[i] != static_cast<float>(1000 * round + i)) ++wrong;
      });
    }
    rank.synchronize();
    rank->barrier().wait();
  });
  EXPECT_EQ(wrong, 0);
  expect_clean(emulation);
}

TEST(Expected, AReceiveOfWhatHasComeBeforeDoesNotWaitForTheSendersHost) {
  run_ahead(
      [](Communicator& comm, int round, const at::Tensor& made) {
        if (comm.rank() == 0) return comm.send(1, {made});
        return round == 0 ? comm.receive(0) : comm.receive(0, floats(kElements));
      },
      [](Tensors got) { return got.at(0); });
}

TEST(Expected, AnAllToAllOfKnownSizesDoesNotWaitForTheOtherHosts) {
  run_ahead(
      [](Communicator& comm, int round, const at::Tensor& made) {
        // Other sizes each time.
        const at::Tensor other = made.slice(0, 0, 3 + round);
        if (comm.rank() == 0) return comm.all_to_all({other, made});
        return comm.all_to_all({made, other}, Signature{floats(kElements)[0], floats(3 + round)[0]});
      },
      [](Tensors got) { return got.at(0); });
}

TEST(Expected, SomethingElseEndsBothRanksThoughTheDeviceHasBegun) {
  const testing::NcclEmulation emulation(2);
  std::atomic<int> failed{0};
  run_emulated(emulation, 2, {.timeout = 20s}, [&](const EmulatedRank& emulated) {
    const AsyncRank rank(emulated);
    rank->connect({{0, 1}});
    const std::string message = message_of([&] {
      for (const std::int64_t count : {kElements, kElements, kElements + 1}) {
        if (rank.rank() == 0) {
          rank->send(1, {rank.empty({count})}).synchronize();
        } else {
          rank->receive(0, Expected(floats(kElements), "this is a test")).synchronize();
        }
      }
      rank->barrier().wait();
    });
    EXPECT_THAT(message, HasSubstr("expected [float32 [500]], got [float32 [501]] from rank 0; this is a test"));
    ++failed;
  });
  EXPECT_EQ(failed, 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// pipelines

constexpr int kRanks = 4;
constexpr int kMicroBatches = 8;

void run_pipelines(const StageFactory& factory, const std::function<void(DualPipe&, Lagging&)>& body,
                   bool clean = true) {
  const testing::NcclEmulation emulation(kRanks);
  run_emulated(emulation, kRanks, {.timeout = 20s}, [&](const EmulatedRank& rank) {
    const auto lagging = std::make_shared<Lagging>(rank.communicator, std::make_shared<AsyncRank>(rank));
    DualPipe pipe(lagging, DualPipeOptions{.num_micro_batches = kMicroBatches}, factory);
    lagging->asked();
    body(pipe, *lagging);
  });
  if (clean) expect_clean(emulation);
}

TEST(Expected, AStepExpectsWhatCameUnderTheSameConditions) {
  const Batch narrow = random_batch(2 * kMicroBatches, 5), wide = random_batch(3 * kMicroBatches, 6);
  const auto losses_of = [](const Batch& batch) {
    return reference(layer, kRanks, batch, kMicroBatches, squared_error(), 1.0 / kMicroBatches).losses;
  };
  const std::vector<double> of_narrow = losses_of(narrow), of_wide = losses_of(wide);
  run_pipelines(as_factory(layer), [&](DualPipe& pipe, Lagging& device) {
    const auto runs = [&](const Batch& batch, bool known, bool train, const char* what) {
      SCOPED_TRACE(what);
      const StepResult result = train ? pipe->step(batch, squared_error()) : pipe->evaluate(batch, squared_error());
      const std::vector<double> losses = result.micro_batch_losses();
      const std::vector<double>& truth = batch.inputs[0].size(0) == narrow.inputs[0].size(0) ? of_narrow : of_wide;
      for (std::size_t m = 0; m < losses.size(); ++m) EXPECT_NEAR(losses[m], truth[m], 1e-12);
      const Asked asked = device.asked();
      EXPECT_GT(asked.receives, 0);
      EXPECT_EQ(asked.expected, known ? asked.receives : 0);
    };
    runs(narrow, false, true, "first");
    runs(narrow, true, true, "again");
    runs(wide, false, true, "other sizes");
    runs(wide, true, true, "the same sizes");
    runs(narrow, true, true, "sizes that are known");
    runs(narrow, false, false, "evaluation");
    runs(narrow, true, false, "evaluation again");
    runs(narrow, true, true, "training again");
    // What the first stage hands on has no gradient any more, which only its holders know of.
    const auto children = pipe->named_children();
    if (children.contains("stage0"))
      for (at::Tensor& parameter : children["stage0"]->parameters()) parameter.set_requires_grad(false);
    runs(narrow, false, true, "frozen");
    runs(narrow, true, true, "frozen again");
    pipe->eval();
    runs(narrow, false, true, "in evaluation mode");
  });
}

/// Stage 1 keeps as many rows as its input tells.
Piece keeps_some_rows(int stage) {
  const Piece all = layer(stage);
  if (stage != 1) return all;
  return {all.module, [all](const Tensors& x) {
            const std::int64_t rows = 1 + (x[0] > 0).sum().item<std::int64_t>() % x[0].size(0);
            return Tensors{all.forward(x)[0].narrow(0, 0, rows)};
          }};
}

LossFn mean_square() {
  return [](const Tensors& outputs, const Tensors&) { return outputs[0].square().mean(); };
}

StageFactory keeping_some_rows(bool declared) {
  return [declared](int number) {
    Stage stage = as_factory(keeps_some_rows)(number);
    if (number == 1) stage.data_dependent_shapes(declared);
    return stage;
  };
}

TEST(Expected, WhatComesBehindAStageWithDataDependentShapesIsTakenAsItComes) {
  std::atomic<int> receives{0}, expected{0};
  run_pipelines(keeping_some_rows(true), [&](DualPipe& pipe, Lagging& device) {
    for (int step = 0; step < 3; ++step) {
      const Batch batch = random_batch(5 * kMicroBatches, 10 + static_cast<std::uint64_t>(step));
      const Reference truth =
          reference(keeps_some_rows, kRanks, batch, kMicroBatches, mean_square(), 1.0 / kMicroBatches);
      pipe->zero_grad();
      const std::vector<double> losses = pipe->step(batch, mean_square()).micro_batch_losses();
      for (std::size_t m = 0; m < losses.size(); ++m) EXPECT_NEAR(losses[m], truth.losses[m], 1e-12);
      expect_gradients(pipe, truth);
      const Asked asked = device.asked();
      if (step == 0) continue;
      receives += asked.receives;
      expected += asked.expected;
    }
  });
  EXPECT_EQ(receives, 2 * 2 * 3 * kMicroBatches) << "both ways between four stages, in two steps";
  EXPECT_EQ(expected, 2 * 2 * kMicroBatches) << "between stages 0 and 1";
}

TEST(Expected, ShapesThatDependOnDataUnsaidAreAnErrorThatNamesTheStageAndTheWayOut) {
  std::atomic<int> failed{0};
  run_pipelines(
      keeping_some_rows(false),
      [&](DualPipe& pipe, Lagging&) {
        pipe->step(random_batch(5 * kMicroBatches, 10), mean_square());
        EXPECT_THAT(message_of([&] { pipe->step(random_batch(5 * kMicroBatches, 11), mean_square()); }),
                    AllOf(HasSubstr("of stage 1 for micro-batch"), HasSubstr("expected [float64 ["),
                          HasSubstr("say so by data_dependent_shapes(true) of stage 1 in the stage factory")));
        ++failed;
      },
      /*clean=*/false);
  EXPECT_EQ(failed, kRanks);
}

}  // namespace
}  // namespace dualpipe::test
