// Stages that communicate, over the NCCL communicator: transfers and collectives on streams of their own, both behind
// a host that runs ahead.
#include <gmock/gmock.h>

#include "dualpipe/pipeline/group_collectives.hpp"
#include "lagging.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using namespace std::chrono_literals;

struct TwoWeights : torch::nn::Module {
  explicit TwoWeights(int stage) {
    first = register_parameter("first", seeded({kWidth, kWidth}, 100 + static_cast<std::uint64_t>(stage)) * 0.4);
    second = register_parameter("second", seeded({kWidth, kWidth}, 200 + static_cast<std::uint64_t>(stage)) * 0.4);
  }
  torch::Tensor first, second;
};

/// Without communication: what each of two groups of rows comes to.
Piece alone(int stage) {
  const auto weights = std::make_shared<TwoWeights>(stage);
  return {weights, [weights](const Tensors& x) {
            return Tensors{2 * torch::tanh(torch::tanh(x[0].mm(weights->first)).mm(weights->second))};
          }};
}

/// Both ranks of the group work on all rows, and each gets the sum of both for its own ones. Where all have the same
/// rows, that is twice what one does alone, and so are the gradients.
StageFactory together(const std::shared_ptr<Communicator>& group) {
  return [group](int number) {
    const auto weights = std::make_shared<TwoWeights>(number);
    Stage stage(weights);
    stage.takes(1)
        .compute("first", [weights](const Tensors& x,
                                    const StageContext&) { return Tensors{torch::tanh(x[0].mm(weights->first))}; })
        .communicate("gather", all_gather(group), {0})
        .compute("second", [weights](const Tensors& x,
                                     const StageContext&) { return Tensors{torch::tanh(x[0].mm(weights->second))}; })
        .communicate("scatter", reduce_scatter(group), {0});
    return stage;
  };
}

class EmulatedChains : public ::testing::TestWithParam<int> {};

TEST_P(EmulatedChains, TwoPipelinesThatShareEachStageTrainAsOneProcess) {
  const int num_ranks = GetParam();  // of each pipeline
  const int num_micro_batches = 2 * num_ranks;
  const Batch batch = random_batch(2 * num_micro_batches, 5);
  const Reference expected =
      reference(alone, num_ranks, batch, num_micro_batches, squared_error(), 1.0 / num_micro_batches);
  for (const bool communicator_per_edge : {false, true}) {
    const testing::NcclEmulation emulation(2 * num_ranks, {.seed = 11});
    run_emulated(emulation, 2 * num_ranks, {.timeout = 30s, .communicator_per_edge = communicator_per_edge},
                 [&](const EmulatedRank& rank) {
                   Lagging world(rank.communicator, std::make_shared<AsyncRank>(rank));
                   const auto pipeline = world.split(world.rank() / num_ranks, world.rank());
                   const auto group = world.split(world.rank() % num_ranks, world.rank());
                   DualPipe pipe(pipeline, DualPipeOptions{.num_micro_batches = num_micro_batches}, together(group));
                   for (int step = 1; step <= 2; ++step) {
                     const std::vector<double> losses = pipe->step(batch, squared_error()).micro_batch_losses();
                     for (std::size_t m = 0; m < losses.size(); ++m) EXPECT_NEAR(losses[m], expected.losses[m], 1e-12);
                     expect_gradients(pipe, expected, 1e-12, step);
                   }
                 });
    expect_clean(emulation);
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, EmulatedChains, ::testing::Values(2, 4));

}  // namespace
}  // namespace dualpipe::test
