// What the tracer sees is what the schedule said.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <iterator>
#include <map>
#include <string>

#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

TEST(Tracer, SeesTheScheduleInItsOrderWithItsPeakActivations) {
  for (const std::string kind : {"dualpipe", "dualpipev", "1f1b", "zb1p", "gpipe", "interleaved", "zbv"}) {
    SCOPED_TRACE(kind);
    const int num_ranks = 4, num_micro_batches = 10;
    const Schedule schedule = make_schedule({kind, num_ranks, num_micro_batches});
    const planner::Report predicted = planner::report(simulate(schedule).timeline);
    run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches, .schedule = kind}, as_factory(layer));
      auto tracer = std::make_shared<Tracer>(comm->rank());
      pipe->add_observer(tracer);
      for (int step = 0; step < 3; ++step) pipe->step(random_batch(20, 4), squared_error());

      const Timeline all = gather(*comm, tracer->last());
      EXPECT_EQ(all.num_ranks, num_ranks);
      ASSERT_EQ(std::ssize(all.stages), schedule.num_stages);
      for (const int stage : pipe->local_stages()) {
        std::int64_t parameters = 0;
        for (const torch::Tensor& parameter : pipe->named_children()["stage" + std::to_string(stage)]->parameters())
          parameters += parameter.numel();
        EXPECT_EQ(all.stages[stage].parameters, parameters);
        EXPECT_GT(all.stages[stage].bytes, parameters);
      }
      std::map<int, std::vector<Step>> steps;
      std::map<Lane, int> lanes;
      for (const Interval& interval : all.intervals) {
        ++lanes[interval.lane];
        EXPECT_LE(interval.begin, interval.end);
        EXPECT_GE(interval.begin, 0);
        if (interval.lane == Lane::compute) steps[interval.rank].push_back(interval.step);
      }
      for (int rank = 0; rank < num_ranks; ++rank) EXPECT_EQ(steps[rank], schedule.ranks[rank]) << "rank " << rank;
      EXPECT_EQ(lanes[Lane::send], static_cast<int>(simulate(schedule).transfers.size()));
      EXPECT_EQ(lanes[Lane::receive], lanes[Lane::send]);
      const planner::Report measured = planner::report(all);
      for (int rank = 0; rank < num_ranks; ++rank) {
        EXPECT_EQ(measured.ranks[rank].peak_activations, predicted.ranks[rank].peak_activations);
        EXPECT_NEAR(measured.ranks[rank].busy + measured.ranks[rank].bubble, measured.makespan, 1e-9);
      }
    });
  }
}

/// Counts graphs alive: what the schedule calls live activations, measured.
struct Alive : torch::autograd::Function<Alive> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& token) {
    context->save_for_backward({token});
    return x.clone();
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext*,
                                               torch::autograd::tensor_list gradients) {
    return {gradients[0], torch::Tensor()};
  }
};

TEST(Tracer, LiveActivationsAreThoseOfTheScheduleWhateverTheNumberOfMicroBatches) {
  const int num_ranks = 4;
  for (const int num_micro_batches : {8, 24}) {
    run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
      // Every forward leaves a token in its graph; tokens alive are counted by weak references.
      std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> tokens;
      int peak = 0;
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches}, as_factory([&](int stage) {
                      const Piece inner = layer(stage);
                      return Piece{inner.module, [&, inner](const Tensors& x) {
                                     const auto token = torch::ones({1}, f64());
                                     tokens.emplace_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
                                         token.storage().unsafeGetStorageImpl()));
                                     const auto y = Alive::apply(inner.forward(x)[0], token);
                                     int alive = 0;
                                     for (const auto& each : tokens) alive += each.expired() ? 0 : 1;
                                     peak = std::max(peak, alive);
                                     return Tensors{y};
                                   }};
                    }));
      for (int step = 0; step < 2; ++step) pipe->step(random_batch(2 * num_micro_batches, 4), squared_error());
      EXPECT_LE(peak, num_ranks + 1) << num_micro_batches << " micro-batches";
      EXPECT_GE(peak, num_ranks);
      int alive = 0;
      for (const auto& each : tokens) alive += each.expired() ? 0 : 1;
      EXPECT_EQ(alive, 0);
    });
  }
}

}  // namespace
}  // namespace dualpipe::test
