// Hosts that run ahead: steps that do not wait for their device, and receives that do not wait for the sender's host.
#include <gmock/gmock.h>

#include <cmath>
#include <latch>
#include <mutex>

#include "forwarding.hpp"
#include "lagging_communicator.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr int num_ranks = 2;
constexpr int num_micro_batches = 4;

/// Holds back the sum of the losses and the number of gradients that are not finite, a step's last operation, until the
/// gate opens.
class GatedNccl final : public ForwardingNccl {
 public:
  GatedNccl(std::shared_ptr<detail::NcclApi> inner, const testing::NcclEmulation& emulation)
      : ForwardingNccl(std::move(inner)), emulation_(emulation) {}
  void all_reduce(void* data, std::size_t count, at::ScalarType dtype, Reduce reduce, detail::NcclComm comm,
                  detail::DeviceStream stream) override {
    const std::lock_guard lock(mutex_);
    if (gate_ && dtype == at::kDouble && count == num_micro_batches + 1)
      emulation_.run(stream, [gate = gate_] { gate->wait(); });
    inner_->all_reduce(data, count, dtype, reduce, comm, stream);
  }
  /// Null: none.
  void set_gate(std::shared_ptr<std::latch> gate) {
    const std::lock_guard lock(mutex_);
    gate_ = std::move(gate);
  }

 private:
  const testing::NcclEmulation& emulation_;
  std::mutex mutex_;
  std::shared_ptr<std::latch> gate_;
};

struct AsynchronousRank {
  DualPipe& pipe;
  LaggingCommunicator& device;
  GatedNccl& nccl;
  const testing::NcclEmulation& emulation;
};

Batch batch_of(std::uint64_t seed) { return random_batch(2 * num_micro_batches, seed); }

Reference truth_of(std::uint64_t seed) {
  return reference(layer, num_ranks, batch_of(seed), num_micro_batches, squared_error(), 1.0 / num_micro_batches);
}

/// Runs `body` on each rank after one step.
void run_asynchronous(const std::function<void(const AsynchronousRank&)>& body) {
  const testing::NcclEmulation emulation(num_ranks);
  std::vector<std::shared_ptr<GatedNccl>> gated(num_ranks);
  run_emulated(
      emulation, num_ranks, {.timeout = 20s},
      [&](const EmulatedRank& rank) {
        const auto lagging =
            std::make_shared<LaggingCommunicator>(rank.communicator, std::make_shared<AsyncRank>(rank));
        DualPipe pipe(lagging, DualPipeOptions{.num_micro_batches = num_micro_batches, .asynchronous = true},
                      as_factory(layer));
        pipe->step(batch_of(1), squared_error()).wait();
        lagging->write_results_late();
        lagging->take_counts();
        body({pipe, *lagging, *gated[static_cast<std::size_t>(lagging->rank())], emulation});
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
        nccl = gated[static_cast<std::size_t>(rank)] = std::make_shared<GatedNccl>(nccl, emulation);
      });
  expect_clean(emulation);
}

void expect_losses(const StepResult& result, const Reference& truth) {
  const std::vector<double> losses = result.micro_batch_losses();
  double sum = 0;
  for (std::size_t m = 0; m < losses.size(); ++m) {
    EXPECT_NEAR(losses[m], truth.losses[m], 1e-12);
    sum += truth.losses[m];
  }
  EXPECT_NEAR(result.loss.item<double>(), sum / num_micro_batches, 1e-12);
}

TEST(Asynchronous, AStepIsOverBeforeItsDeviceIs) {
  run_asynchronous([](const AsynchronousRank& rank) {
    for (std::uint64_t seed = 2; seed < 5; ++seed) {
      const auto gate = std::make_shared<std::latch>(1);
      rank.nccl.set_gate(gate);
      rank.pipe->zero_grad();
      const StepResult result = rank.pipe->step(batch_of(seed), squared_error());
      EXPECT_TRUE(std::isnan(result.loss.item<double>()));
      const CallCounts counts = rank.device.take_counts();
      EXPECT_EQ(counts.host_waits, counts.receives) << "the host of this test computes, and so reads what it receives";
      gate->count_down();
      const StepResult copy = result;
      copy.wait();
      const Reference truth = truth_of(seed);
      expect_losses(result, truth);
      expect_gradients(rank.pipe, truth);
      result.wait();
    }
  });
}

TEST(Asynchronous, WeightsAndMetricsHoldAfterTheWait) {
  run_asynchronous([](const AsynchronousRank& rank) {
    const std::vector<double> weights{1, 0, 2, 5};
    const Reference truth = truth_of(2);
    double loss = 0, positive = 0;
    for (std::size_t m = 0; m < weights.size(); ++m) {
      loss += truth.losses[m] * weights[m] / 8;
      positive += truth.outputs[m][0].gt(0).sum().item<double>();
    }
    Batch batch = batch_of(2);
    batch.weights = weights;
    const StepResult result = rank.pipe->step(batch, [](const at::Tensor& x, const at::Tensor& y) {
      return std::pair(torch::mse_loss(x, y), x.gt(0).sum());
    });
    result.wait();
    EXPECT_NEAR(result.loss.item<double>(), loss, 1e-12);
    EXPECT_EQ(result.metrics.numel(), 1);
    EXPECT_EQ(result.metrics[0].item<double>(), positive);
    EXPECT_EQ(result.added_losses.numel(), num_ranks);
  });
}

TEST(Asynchronous, StepsFollowOneAnotherWithoutAWait) {
  run_asynchronous([](const AsynchronousRank& rank) {
    std::vector<StepResult> results;
    for (std::uint64_t seed = 2; seed < 8; ++seed) {
      rank.pipe->zero_grad();
      results.push_back(rank.pipe->step(batch_of(seed), squared_error()));
    }
    for (std::uint64_t seed = 2; seed < 8; ++seed) expect_losses(results[seed - 2], truth_of(seed));
    expect_gradients(rank.pipe, truth_of(7));
    expect_losses(rank.pipe->evaluate(batch_of(9), squared_error()), truth_of(9));
  });
}

TEST(Asynchronous, WhatTheDeviceFailsInLaterIsFoundByWaitAndByTheNextStep) {
  for (const bool waits : {true, false}) {
    std::atomic<int> failed{0};
    std::latch stepped(num_ranks);
    run_asynchronous([&](const AsynchronousRank& rank) {
      const auto gate = std::make_shared<std::latch>(1);
      rank.nccl.set_gate(gate);
      rank.pipe->zero_grad();
      const StepResult result = rank.pipe->step(batch_of(2), squared_error());
      stepped.arrive_and_wait();
      if (rank.device.rank() == 1) rank.emulation.break_down(1, "the link is down");
      const auto what = AllOf(HasSubstr("rank 1: NCCL: the link is down"), HasSubstr("go back to a checkpoint"));
      if (waits) {
        EXPECT_THAT(message_of([&] { result.wait(); }), what);
      } else {
        while (message_of([&] { rank.device.fence(); }).empty()) std::this_thread::sleep_for(1ms);
      }
      EXPECT_THAT(message_of([&] { rank.pipe->step(batch_of(3), squared_error()); }), what);
      EXPECT_THAT(message_of([&] { rank.pipe->step(batch_of(3), squared_error()); }), HasSubstr("earlier step failed"));
      gate->count_down();
      ++failed;
    });
    EXPECT_EQ(failed, num_ranks);
  }
}

TEST(Asynchronous, WhatUserCodeThrowsLeavesGradientsAsTheyWere) {
  std::atomic<int> failed{0};
  run_asynchronous([&](const AsynchronousRank& rank) {
    Tensors before;
    for (const at::Tensor& parameter : rank.pipe->parameters()) before.push_back(parameter.grad().clone());
    int calls = 0;
    const LossFn fails = [&](const Tensors& outputs, const Tensors& targets) {
      if (rank.device.rank() == 0 && ++calls == num_micro_batches / 2)
        throw std::domain_error("the loss is not a number");
      return squared_error()(outputs, targets);
    };
    EXPECT_THAT(message_of([&] { rank.pipe->step(batch_of(2), fails); }), HasSubstr("the loss is not a number"));
    std::size_t i = 0;
    for (const at::Tensor& parameter : rank.pipe->parameters())
      EXPECT_TRUE(torch::equal(parameter.grad(), before[i++]));
    ++failed;
  });
  EXPECT_EQ(failed, num_ranks);
}

TEST(Asynchronous, ChangesNothingOnTheCpu) {
  const Reference truth = truth_of(1);
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> communicator) {
    DualPipe pipe(communicator, DualPipeOptions{.num_micro_batches = num_micro_batches, .asynchronous = true},
                  as_factory(layer));
    for (int step = 1; step <= 2; ++step) {
      const StepResult result = pipe->step(batch_of(1), squared_error());
      EXPECT_FALSE(std::isnan(result.loss.item<double>()));
      expect_losses(result, truth);
      expect_gradients(pipe, truth, 1e-12, step);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// A receive of a known signature is launched before its header comes; the header is compared all the same:
// one communicator

constexpr std::int64_t num_elements = 500;

Signature floats(std::int64_t count) { return {{.dtype = at::kFloat, .sizes = {count}}}; }

/// Rank 1 takes its result before the host of rank 0 has announced anything.
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
      at::Tensor made = rank.empty({num_elements});
      rank.run(slow_fill(made, [=](std::int64_t i) { return static_cast<float>(1000 * round + i); }, 300us));
      Pending pending = call(*rank, round, made);
      const at::Tensor got = rank.rank() == 1 ? of_rank_0(pending.take()) : (pending.wait(), at::Tensor());
      if (rank.rank() == 0) continue;
      if (round == 1) taken.count_down();
      rank.run([&wrong, got, round] {
        for (std::int64_t i = 0; i < num_elements; ++i)
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
        return round == 0 ? comm.receive(0) : comm.receive(0, floats(num_elements));
      },
      [](Tensors got) { return got.at(0); });
}

TEST(Expected, AnAllToAllOfKnownSizesDoesNotWaitForTheOtherHosts) {
  run_ahead(
      [](Communicator& comm, int round, const at::Tensor& made) {
        // Other sizes each time.
        const at::Tensor other = made.slice(0, 0, 3 + round);
        if (comm.rank() == 0) return comm.all_to_all({other, made});
        return comm.all_to_all({made, other}, Signature{floats(num_elements)[0], floats(3 + round)[0]});
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
      for (const std::int64_t count : {num_elements, num_elements, num_elements + 1}) {
        if (rank.rank() == 0) {
          rank->send(1, {rank.empty({count})}).synchronize();
        } else {
          rank->receive(0, Expected(floats(num_elements), "this is a test")).synchronize();
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

constexpr int pipeline_ranks = 4;
constexpr int pipeline_micro_batches = 8;

void run_pipelines(const StageFactory& factory, const std::function<void(DualPipe&, LaggingCommunicator&)>& body,
                   bool clean = true) {
  const testing::NcclEmulation emulation(pipeline_ranks);
  run_emulated(emulation, pipeline_ranks, {.timeout = 20s}, [&](const EmulatedRank& rank) {
    const auto lagging = std::make_shared<LaggingCommunicator>(rank.communicator, std::make_shared<AsyncRank>(rank));
    DualPipe pipe(lagging, DualPipeOptions{.num_micro_batches = pipeline_micro_batches}, factory);
    lagging->take_counts();
    body(pipe, *lagging);
  });
  if (clean) expect_clean(emulation);
}

TEST(Expected, AStepExpectsWhatCameUnderTheSameConditions) {
  const Batch narrow = random_batch(2 * pipeline_micro_batches, 5), wide = random_batch(3 * pipeline_micro_batches, 6);
  const auto losses_of = [](const Batch& batch) {
    return reference(layer, pipeline_ranks, batch, pipeline_micro_batches, squared_error(),
                     1.0 / pipeline_micro_batches)
        .losses;
  };
  const std::vector<double> of_narrow = losses_of(narrow), of_wide = losses_of(wide);
  run_pipelines(as_factory(layer), [&](DualPipe& pipe, LaggingCommunicator& device) {
    const auto runs = [&](const Batch& batch, bool known, bool train, const char* what) {
      SCOPED_TRACE(what);
      const StepResult result = train ? pipe->step(batch, squared_error()) : pipe->evaluate(batch, squared_error());
      const std::vector<double> losses = result.micro_batch_losses();
      const std::vector<double>& truth = batch.inputs[0].size(0) == narrow.inputs[0].size(0) ? of_narrow : of_wide;
      for (std::size_t m = 0; m < losses.size(); ++m) EXPECT_NEAR(losses[m], truth[m], 1e-12);
      const CallCounts counts = device.take_counts();
      EXPECT_GT(counts.receives, 0);
      EXPECT_EQ(counts.expected, known ? counts.receives : 0);
    };
    runs(narrow, false, true, "first");
    runs(narrow, true, true, "again");
    runs(wide, false, true, "other sizes");
    runs(wide, true, true, "the same sizes");
    runs(narrow, true, true, "sizes that are known");
    runs(narrow, false, false, "evaluation");
    runs(narrow, true, false, "evaluation again");
    runs(narrow, true, true, "training again");
    // The first stage's output loses requires_grad, which only its holders know.
    const auto children = pipe->named_children();
    if (children.contains("stage0"))
      for (at::Tensor& parameter : children["stage0"]->parameters()) parameter.set_requires_grad(false);
    runs(narrow, false, true, "frozen");
    runs(narrow, true, true, "frozen again");
    pipe->eval();
    runs(narrow, false, true, "in evaluation mode");
  });
}

/// Stage 1 keeps a number of rows that depends on its input.
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
  run_pipelines(keeping_some_rows(true), [&](DualPipe& pipe, LaggingCommunicator& device) {
    for (int step = 0; step < 3; ++step) {
      const Batch batch = random_batch(5 * pipeline_micro_batches, 10 + static_cast<std::uint64_t>(step));
      const Reference truth = reference(keeps_some_rows, pipeline_ranks, batch, pipeline_micro_batches, mean_square(),
                                        1.0 / pipeline_micro_batches);
      pipe->zero_grad();
      const std::vector<double> losses = pipe->step(batch, mean_square()).micro_batch_losses();
      for (std::size_t m = 0; m < losses.size(); ++m) EXPECT_NEAR(losses[m], truth.losses[m], 1e-12);
      expect_gradients(pipe, truth);
      const CallCounts counts = device.take_counts();
      if (step == 0) continue;
      receives += counts.receives;
      expected += counts.expected;
    }
  });
  EXPECT_EQ(receives, 2 * 2 * 3 * pipeline_micro_batches) << "both ways between four stages, in two steps";
  EXPECT_EQ(expected, 2 * 2 * pipeline_micro_batches) << "between stages 0 and 1";
}

TEST(Expected, ShapesThatDependOnDataUnsaidAreAnErrorThatNamesTheStageAndTheWayOut) {
  std::atomic<int> failed{0};
  run_pipelines(
      keeping_some_rows(false),
      [&](DualPipe& pipe, LaggingCommunicator&) {
        pipe->step(random_batch(5 * pipeline_micro_batches, 10), mean_square());
        EXPECT_THAT(message_of([&] { pipe->step(random_batch(5 * pipeline_micro_batches, 11), mean_square()); }),
                    AllOf(HasSubstr("of stage 1 for micro-batch"), HasSubstr("expected [float64 ["),
                          HasSubstr("say so by data_dependent_shapes(true) of stage 1 in the stage factory")));
        ++failed;
      },
      /*clean=*/false);
  EXPECT_EQ(failed, pipeline_ranks);
}

}  // namespace
}  // namespace dualpipe::test
