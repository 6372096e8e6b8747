// predict() merges the outputs of the micro-batches as one process would return them, or says why it cannot.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr Merge kStack{Merge::How::stack};
constexpr Merge kList{Merge::How::list};

/// [time, batch, features] with two samples in each micro-batch.
torch::Tensor sequences() { return seeded({3, 2 * kMicroBatches, 4}, 1); }

/// Outputs of one micro-batch: [samples, 3], [], and the first 1, 2 or 3 times of all its samples.
Tensors outputs_of(const torch::Tensor& x, int micro_batch) {
  return {x.mean(0).narrow(1, 0, 3), x.sum(), x.narrow(0, 0, 1 + micro_batch % 3)};
}

DualPipeOptions options_of(const std::string& kind, std::vector<Merge> merges) {
  return {.num_micro_batches = kMicroBatches, .schedule = kind, .batch_dim = 1, .merge_outputs = std::move(merges)};
}

/// Stages that hand on what they get; the last one returns outputs_of it.
Stage stage(int number) {
  return Stage().compute("node", [number](const Tensors& inputs, const StageContext& context) {
    return number == kRanks - 1 ? outputs_of(inputs[0], context.micro_batch) : inputs;
  });
}

/// Calls `expect` with what predict() returns where it returns something.
void predict(const std::vector<Merge>& merges, const Batch& batch, const std::function<void(const Tensors&)>& expect) {
  for (const std::string kind : {"dualpipe", "1f1b"}) {
    SCOPED_TRACE(kind);
    run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, options_of(kind, merges), stage);
      const Tensors merged = pipe->predict(batch);
      EXPECT_EQ(merged.empty(), !pipe->computes_loss());
      if (!merged.empty()) expect(merged);
    });
  }
}

TEST(Merge, EachOutputInItsOwnWay) {
  const torch::Tensor x = sequences();
  predict({{}, kStack, kList}, {.inputs = {x}}, [&](const Tensors& merged) {
    ASSERT_EQ(merged.size(), 2u + kMicroBatches);
    EXPECT_LE(difference(merged[0], x.mean(0).narrow(1, 0, 3)), 1e-12);
    EXPECT_LE(difference(merged[1], x.reshape({3, kMicroBatches, 2, 4}).sum({0, 2, 3})), 1e-12);
    for (int m = 0; m < kMicroBatches; ++m)
      EXPECT_TRUE(torch::equal(merged[2 + m], x.narrow(1, 2 * m, 2).narrow(0, 0, 1 + m % 3)));
  });
}

TEST(Merge, ListsComeOutputByOutput) {
  const torch::Tensor x = sequences();
  predict({kList, kStack, kList}, {.inputs = {x}}, [&](const Tensors& merged) {
    ASSERT_EQ(merged.size(), 2u * kMicroBatches + 1);
    EXPECT_EQ(merged[kMicroBatches].sizes(), (std::vector<std::int64_t>{kMicroBatches}));
    for (int m = 0; m < kMicroBatches; ++m) {
      const Tensors alone = outputs_of(x.narrow(1, 2 * m, 2), m);
      EXPECT_TRUE(torch::equal(merged[m], alone[0]));
      EXPECT_TRUE(torch::equal(merged[kMicroBatches + 1 + m], alone[2]));
    }
  });
}

TEST(Merge, AlongOtherDimensions) {
  const torch::Tensor x = sequences();
  predict({{Merge::How::stack, 1}, kStack, {Merge::How::concat, 0}}, {.inputs = {x}}, [&](const Tensors& merged) {
    ASSERT_EQ(merged.size(), 3u);
    ASSERT_EQ(merged[0].sizes(), (std::vector<std::int64_t>{2, kMicroBatches, 3}));
    EXPECT_LE(difference(merged[0].transpose(0, 1).flatten(0, 1), x.mean(0).narrow(1, 0, 3)), 1e-12);
    std::int64_t begin = 0;
    for (int m = 0; m < kMicroBatches; begin += 1 + m++ % 3)
      EXPECT_TRUE(torch::equal(merged[2].narrow(0, begin, 1 + m % 3), outputs_of(x.narrow(1, 2 * m, 2), m)[2]));
    EXPECT_EQ(merged[2].size(0), begin);
  });
}

TEST(Merge, OneMicroBatch) {
  const torch::Tensor x = sequences();
  const Batch batch = Batch::from_micro_batches({{.inputs = {x}}});
  predict({{}, kStack, kList}, batch, [&](const Tensors& merged) {
    EXPECT_TRUE(torch::equal(merged.at(0), x.mean(0).narrow(1, 0, 3)));
    EXPECT_TRUE(torch::equal(merged.at(1), x.sum().reshape({1})));
  });
  predict({}, batch, [&](const Tensors& merged) { EXPECT_TRUE(torch::equal(merged.at(1), x.sum())); });
}

TEST(Merge, WhatCannotBeMerged) {
  const auto failure = [](const std::vector<Merge>& merges) {
    std::string text;
    for (const std::string kind : {"dualpipe", "1f1b"}) {
      text = failure_on_all(kRanks, [&](auto comm) {
        DualPipe pipe(comm, options_of(kind, merges), stage);
        const std::string first = message_of([&] { pipe->predict({.inputs = {sequences()}}); });
        try {
          pipe->predict({.inputs = {sequences()}});
        } catch (const InvalidArgument& error) {
          EXPECT_EQ(error.what(), first);  // the pipeline goes on
          throw;
        }
      });
    }
    return text;
  };
  EXPECT_THAT(failure({}), AllOf(HasSubstr("cannot merge output 0 by concat along dimension 1"),
                                 HasSubstr("the micro-batch has 2 samples"), HasSubstr("merge_outputs")));
  EXPECT_THAT(failure({kStack}), HasSubstr("merge_outputs has 1 entries, but the last stage has 3 outputs"));
  EXPECT_THAT(failure({{}, {}, kList}),
              HasSubstr("output 1 by concat along dimension 0: that of micro-batch 0 has sizes []"));
  EXPECT_THAT(failure({{Merge::How::stack, 3}, kStack, kList}),
              HasSubstr("output 0 by stack along dimension 3: that of micro-batch 0 has sizes [2, 3]"));
  EXPECT_THAT(failure({{}, kStack, kStack}), AllOf(HasSubstr("output 2 by stack along dimension 0"),
                                                   HasSubstr("micro-batch 1 is [float64 [2, 2, 4]]")));
  EXPECT_THAT(failure({{}, kStack, {Merge::How::concat, 1}}),
              AllOf(HasSubstr("output 2 by concat along dimension 1"), HasSubstr("[float64 [1, 2, 4]]")));
  EXPECT_THAT(failure({{}, kStack, {Merge::How::concat, -1}}), HasSubstr("dim must not be negative, got -1"));
}

TEST(Merge, RanksThatDisagree) {
  EXPECT_THAT(failure_on_all(kRanks,
                             [](auto comm) {
                               std::vector<Merge> merges{{}, kStack};
                               if (comm->rank() == 2) merges[1] = kList;
                               DualPipe(comm, options_of("1f1b", merges), stage);
                             }),
              AllOf(HasSubstr("merge_outputs [concat along dimension 0, stack along dimension 0]"),
                    HasSubstr("merge_outputs [concat along dimension 0, list]")));
}

}  // namespace
}  // namespace dualpipe::test
