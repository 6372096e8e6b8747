// Stages that are computed again before their backward, against the same without.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/planner/memory.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/stage/stage_run.hpp"
#include "pipeline/chains.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

/// Two layers with running statistics between them, as three nodes.
Stage normed(int number, const std::function<void(Stage&)>& after_first, bool recompute) {
  Layer first(2 * number), second(2 * number + 1);
  torch::nn::BatchNorm1d norm(kWidth);
  norm->to(torch::kDouble);
  auto module = std::make_shared<torch::nn::Module>();
  module->register_module("first", first.ptr());
  module->register_module("norm", norm.ptr());
  module->register_module("second", second.ptr());
  Stage stage(module);
  stage.compute("first", [first](const torch::Tensor& x) mutable { return first->forward(x); });
  after_first(stage);
  stage.compute("norm", [norm](const torch::Tensor& x) mutable { return norm->forward(x); });
  stage.recompute(recompute);
  stage.compute("second", [second](const torch::Tensor& x) mutable { return second->forward(x); });
  return stage;
}

/// Losses, gradients and buffers of each rank after two steps.
std::vector<Tensors> results_of(const std::string& kind, int num_ranks, const std::function<Stage(int)>& factory,
                                std::optional<std::uint64_t> seed = {}) {
  std::vector<Tensors> results(num_ranks);
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = kind, .seed = seed}, factory);
    Tensors& mine = results[comm->rank()];
    for (std::uint64_t step = 0; step < 2; ++step) {
      const Batch batch = random_batch(4 * kMicroBatches, 3 + step);
      mine.push_back(pipe->step(batch, squared_error()).losses.clone());
      mine.push_back(pipe->evaluate(batch, squared_error()).losses.clone());
    }
    for (const at::Tensor& parameter : pipe->parameters()) mine.push_back(parameter.grad().clone());
    for (const at::Tensor& buffer : pipe->buffers()) mine.push_back(buffer.clone());
  });
  return results;
}

TEST(Recompute, GivesTheSameBitsWithEveryKind) {
  for (const auto& [kind, num_ranks] : std::vector<std::pair<std::string, int>>{{"dualpipe", 2},
                                                                                {"dualpipe", 4},
                                                                                {"dualpipev", 2},
                                                                                {"1f1b", 4},
                                                                                {"zb1p", 4},
                                                                                {"zbv", 2},
                                                                                {"interleaved", 2}}) {
    SCOPED_TRACE(kind + " on " + std::to_string(num_ranks));
    const auto whole = [](bool recompute) {
      return [recompute](int number) {
        Stage stage = normed(number, [](Stage&) {}, false);
        return stage.recompute(recompute);
      };
    };
    // One node of three is computed again, or two.
    const auto some = [](int number) {
      return normed(number, [](Stage& stage) { stage.recompute(false); }, number % 2 == 0);
    };
    EXPECT_EQ(whole(true)(0).structure(), "C");
    EXPECT_EQ(whole(true)(0).structure(true), "CC");
    EXPECT_EQ(some(0).structure(true), "CC");
    EXPECT_EQ(some(1).structure(true), "C");
    const std::vector<Tensors> plain = results_of(kind, num_ranks, whole(false));
    for (const auto& again : {results_of(kind, num_ranks, whole(true)), results_of(kind, num_ranks, some)})
      for (int rank = 0; rank < num_ranks; ++rank) {
        ASSERT_EQ(again[rank].size(), plain[rank].size());
        for (std::size_t i = 0; i < plain[rank].size(); ++i)
          EXPECT_TRUE(torch::equal(again[rank][i], plain[rank][i])) << "rank " << rank << ", " << i;
      }
  }
}

TEST(Recompute, DrawsWhatTheSeedSays) {
  // Three nodes of one layer that draw; none of them is computed again, all are, one is, or two are. They share a weight,
  // so the sum of its gradients over several pieces has another order.
  const auto noisy = [](std::array<bool, 3> recompute) {
    return [recompute](int number) {
      Layer layer(number);
      Stage stage(layer);
      for (int node = 0; node < 3; ++node) {
        Stage part;
        part.compute("draws", [layer](const Tensors& x, const StageContext& context) mutable {
          const auto mask = torch::bernoulli(torch::full_like(x[0], 0.7), context.generator);
          return layer->forward(x[0] * mask);
        });
        part.recompute(recompute[node]);
        stage.append(std::to_string(node), part);
      }
      return stage;
    };
  };
  for (const std::string kind : {"dualpipe", "zb1p"}) {
    const auto results = [&](std::array<bool, 3> recompute) { return results_of(kind, 2, noisy(recompute), 5); };
    const std::vector<Tensors> plain = results({false, false, false});
    for (const auto& recompute : std::vector<std::array<bool, 3>>{
             {true, true, true}, {false, true, false}, {true, false, true}, {true, true, false}}) {
      const std::vector<Tensors> again = results(recompute);
      for (int rank = 0; rank < 2; ++rank)
        for (std::size_t i = 0; i < plain[rank].size(); ++i)
          EXPECT_LE(difference(again[rank][i], plain[rank][i]), 1e-12) << kind << ", rank " << rank << ", " << i;
    }
  }
}

TEST(Recompute, BesideCollectives) {
  using namespace chains;  // NOLINT(google-build-using-namespace)
  const Stages stages{row_of({moe(0), dense(1)}), row_of({dense(2), moe(3)})};
  std::array<std::vector<Tensors>, 2> results;
  for (const bool recompute : {false, true}) {
    results[recompute].resize(4);
    run_ranks(4, [&](std::shared_ptr<Communicator> comm) {
      const int pipeline = comm->rank() / 2;
      const auto pipes = comm->split(pipeline, comm->rank() % 2);
      const auto group = comm->split(comm->rank() % 2, pipeline);
      const StageFactory make = factory_of(stages, pipeline, group);
      DualPipe pipe(pipes, {.num_micro_batches = 4, .schedule = "1f1b"}, [&](int number) {
        Stage stage = make(number);
        return stage.recompute(recompute);
      });
      Batch batch = random_batch(16, 5 + pipeline);
      Tensors& mine = results[recompute][comm->rank()];
      mine.push_back(pipe->step(batch, moe_loss()).losses.clone());
      for (const at::Tensor& parameter : pipe->parameters()) mine.push_back(parameter.grad().clone());
    });
  }
  for (int rank = 0; rank < 4; ++rank)
    for (std::size_t i = 0; i < results[0][rank].size(); ++i)
      EXPECT_TRUE(torch::equal(results[0][rank][i], results[1][rank][i])) << "rank " << rank << ", " << i;
}

TEST(Recompute, DrawsTheSameNumbersAndLeavesTheGeneratorAlone) {
  std::vector<Tensors> found;
  for (const bool recompute : {false, true}) {
    Layer layer(1);
    Stage stage(layer);
    stage.compute("dropout", [layer](const torch::Tensor& x) mutable {
      return torch::dropout(layer->forward(torch::dropout(x, 0.5, true)), 0.3, true);
    });
    stage.recompute(recompute);
    torch::manual_seed(5);
    const Tensors inputs{seeded({16, kWidth}, 1).requires_grad_()};
    StageRun first = stage.forward(inputs, {.micro_batch = 0});
    StageRun second = stage.forward(inputs, {.micro_batch = 1});
    const auto gradient = seeded({16, kWidth}, 2);
    Tensors mine{torch::rand({3})};
    for (StageRun* run : {&first, &second}) {
      mine.push_back(run->outputs()[0]);
      mine.push_back(run->backward_input({gradient})[0]);
      run->backward_weight();
    }
    mine.push_back(torch::rand({3}));
    for (const at::Tensor& parameter : layer->parameters()) mine.push_back(parameter.grad());
    found.push_back(mine);
  }
  for (std::size_t i = 0; i < found[0].size(); ++i) EXPECT_TRUE(torch::equal(found[0][i], found[1][i])) << i;
}

/// Counts what is kept for backwards of one rank: each forward saves one tensor of its own.
struct Counter {
  std::atomic<int> now{0}, peak{0};
  torch::Tensor make(const torch::Tensor& like) {
    auto* const values = new std::vector<double>(static_cast<std::size_t>(like.numel()), 0.5);
    peak = std::max(peak.load(), ++now);
    return torch::from_blob(
        values->data(), like.sizes(),
        [this, values](void*) {
          --now;
          delete values;
        },
        f64());
  }
};

TEST(Recompute, KeepsWhatThePlannerSays) {
  for (const auto& [kind, num_ranks] :
       std::vector<std::pair<std::string, int>>{{"gpipe", 2}, {"1f1b", 4}, {"zb1p", 4}, {"dualpipe", 4}, {"zbv", 2}}) {
    for (const bool recompute : {false, true}) {
      SCOPED_TRACE(kind + (recompute ? ", recomputed" : ""));
      const Schedule schedule = make_schedule({kind, num_ranks, kMicroBatches});
      planner::MemoryCosts costs{.activation = 1, .weight = 1};
      if (recompute) costs.kept = 0;
      const auto expected = planner::memory(schedule, costs);
      std::vector<Counter> counters(num_ranks);
      run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
        Counter& counter = counters[comm->rank()];
        DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = kind}, [&](int number) {
          Layer layer(number);
          Stage stage(layer);
          stage.compute("layer", [&counter, layer](const torch::Tensor& x) mutable {
            return x + layer->bias * counter.make(layer->bias);  // kept until the weight part
          });
          return stage.recompute(recompute);
        });
        pipe->step(random_batch(2 * kMicroBatches, 3), squared_error());
        EXPECT_EQ(counter.now, 0);
      });
      for (int rank = 0; rank < num_ranks; ++rank) {
        EXPECT_LE(counters[rank].peak, expected[rank].peak) << "rank " << rank;
        // In a pair the forward may be over before the backward computes again.
        if (!recompute || (kind != "dualpipe" && kind != "zbv")) {
          EXPECT_EQ(counters[rank].peak, expected[rank].peak) << "rank " << rank;
        }
      }
    }
  }
}

TEST(Recompute, WhatCannotBeComputedAgainIsAnError) {
  const auto text = failure_on_all(1, [](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 2, .schedule = "1f1b"}, [](int number) {
      Layer layer(number);
      Stage stage(layer);
      stage.compute("in place", [layer](const torch::Tensor& x) mutable { return layer->forward(x.mul_(2)); });
      return stage.recompute(true);
    });
    pipe->step(random_batch(4, 3), squared_error());
  });
  EXPECT_THAT(text, AllOf(HasSubstr("stage 0 writes in place into what node 'in place' is given"),
                          HasSubstr("recompute(false)")));
  Layer layer(0);
  const Stage frozen = as_stage(layer);
  frozen.freeze(0, 0);
  Stage same = frozen;
  same.recompute(true);  // a copy made afterwards is a stage of its own
  EXPECT_TRUE(same.recomputes(0));
  EXPECT_FALSE(frozen.recomputes(0));
}

TEST(Recompute, AnUnregisteredWeightIsFoundAllTheSame) {
  const auto stray = seeded({kWidth, kWidth}, 4).requires_grad_();
  const auto text = failure_on_all(1, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 2, .schedule = "1f1b"}, [&](int number) {
      Layer layer(number);
      Stage stage(layer);
      stage.compute("stray", [layer, stray](const torch::Tensor& x) mutable { return layer->forward(x).mm(stray); });
      return stage.recompute(true);
    });
    pipe->step(random_batch(4, 3), squared_error());
  });
  EXPECT_THAT(text, HasSubstr("that requires grad and is a parameter of none of this rank's stages"));
}

}  // namespace
}  // namespace dualpipe::test
