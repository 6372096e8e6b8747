// Gradients, losses and outputs of every kind of schedule equal those of one process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cctype>
#include <chrono>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/schedule/generate.hpp"
#include "pipeline/items.hpp"
#include "pipeline/network.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using Case = std::tuple<std::string, int, Network, Publish>;

class Gradients : public ::testing::TestWithParam<Case> {};

TEST_P(Gradients, EqualOneProcess) {
  const auto& [kind, num_ranks, network, publish] = GetParam();
  const int num_micro_batches = kind == "dualpipe" ? 2 * num_ranks : 2 * num_ranks + 1;
  const int num_stages = make_schedule({kind, num_ranks, num_micro_batches}).num_stages;
  const Batch batch = random_batch(2 * num_micro_batches, 7);
  const Reference expected =
      reference(layer, num_stages, batch, num_micro_batches, squared_error(), 1.0 / num_micro_batches);

  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(
        over(network, comm, std::chrono::microseconds(300)),
        DualPipeOptions{
            .num_micro_batches = num_micro_batches, .schedule = kind, .publish = publish, .keep_outputs = true},
        as_factory(layer));
    // A rank that neither feeds inputs nor computes losses needs no data.
    const bool needs_data = pipe->feeds_inputs() || pipe->computes_loss();
    const StepResult result = pipe->step(needs_data ? batch : Batch{}, squared_error());

    EXPECT_EQ(result.micro_batch_losses(), expected.losses);
    double mean = 0;
    for (const double loss : expected.losses) mean += loss / num_micro_batches;
    EXPECT_NEAR(result.loss.item<double>(), mean, 1e-12);
    EXPECT_FALSE(result.loss.requires_grad());
    int kept = 0;
    for (int m = 0; m < num_micro_batches; ++m) {
      if (result.outputs[m].empty()) continue;
      ++kept;
      EXPECT_TRUE(torch::equal(result.outputs[m][0], expected.outputs[m][0])) << "micro-batch " << m;
      EXPECT_FALSE(result.outputs[m][0].requires_grad());
    }
    EXPECT_EQ(kept > 0, pipe->computes_loss());
    expect_gradients(pipe, expected);
  });
}

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  const auto& [kind, num_ranks, network, publish] = info.param;
  const std::string networks[] = {"direct", "serial", "delayed"};
  return "schedule_" + kind + "_" + std::to_string(num_ranks) + "_" + networks[static_cast<int>(network)] +
         (publish == Publish::early ? "_early" : "_atomic");
}

INSTANTIATE_TEST_SUITE_P(Direct, Gradients,
                         ::testing::Combine(::testing::ValuesIn(schedule_kinds()), ::testing::Values(2, 4, 8),
                                            ::testing::Values(Network::direct),
                                            ::testing::Values(Publish::early, Publish::atomic)),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Networks, Gradients,
                         ::testing::Combine(::testing::ValuesIn(schedule_kinds()), ::testing::Values(2, 4, 8),
                                            ::testing::Values(Network::serial, Network::delayed),
                                            ::testing::Values(Publish::early)),
                         name_of);

class Items : public ::testing::TestWithParam<Item> {};

TEST_P(Items, EqualOneProcess) {
  const Item& item = GetParam();
  for (const int num_ranks : {2, 4})
    for (const Layout& layout : layouts_of(num_ranks)) {
      const Truth truth = item.truth(layout);
      std::mutex mutex;
      std::set<std::string> found;
      run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
        const std::vector<std::string> names = expect_item(item, Mesh(comm, layout.mesh), layout.kind, truth);
        const std::lock_guard lock(mutex);
        found.insert(names.begin(), names.end());
      });
      EXPECT_EQ(found.size(), truth.size()) << "some rank has each of them";
    }
}

INSTANTIATE_TEST_SUITE_P(All, Items, ::testing::ValuesIn(items()), [](const auto& each) {
  std::string name = each.param.name;
  std::erase_if(name, [](char letter) { return std::isalnum(static_cast<unsigned char>(letter)) == 0; });
  return name;
});

TEST(Gradients, OddNumbersOfRanks) {
  for (const std::string kind : {"dualpipev", "1f1b", "zb1p", "gpipe", "interleaved", "zbv"}) {
    for (const int num_ranks : {1, 3}) {
      SCOPED_TRACE(kind + " on " + std::to_string(num_ranks));
      const int num_micro_batches = 9;
      const int num_stages = make_schedule({kind, num_ranks, num_micro_batches}).num_stages;
      const Batch batch = random_batch(num_micro_batches, 11);
      const Reference expected = reference(layer, num_stages, batch, num_micro_batches, squared_error(), 1.0);
      run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
        DualPipe pipe(
            comm,
            DualPipeOptions{
                .num_micro_batches = num_micro_batches, .schedule = kind, .loss_reduction = LossReduction::sum},
            as_factory(layer));
        const StepResult result = pipe->step(batch, squared_error());
        EXPECT_EQ(result.micro_batch_losses(), expected.losses);
        expect_gradients(pipe, expected);
      });
    }
  }
}

TEST(Gradients, ALossThatIsWeightedByWhatCountsInTheBatch) {
  // All targets of micro-batch 2 are masked, and half of those of micro-batch 5.
  namespace F = torch::nn::functional;
  Batch batch = random_batch(16, 9);
  at::Tensor target = torch::arange(16).remainder(kWidth);
  target.narrow(0, 4, 2).fill_(-100);
  target.narrow(0, 10, 1).fill_(-100);
  batch.targets = {target};
  std::vector<Layer> model;
  at::Tensor x = batch.inputs[0];
  for (int s = 0; s < 4; ++s) x = model.emplace_back(s)->forward(x);
  const at::Tensor whole = F::cross_entropy(x, target);  // the mean over the 13 that count
  whole.backward();

  const double count = target.ne(-100).sum().item<double>();
  const LossFn loss = [count](const at::Tensor& output, const at::Tensor& wanted) {
    return F::cross_entropy(output, wanted, F::CrossEntropyFuncOptions().reduction(torch::kSum)) / count;
  };
  run_ranks(4, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 8, .loss_reduction = LossReduction::sum}, as_factory(layer));
    EXPECT_NEAR(pipe->step(batch, loss).loss.item<double>(), whole.item<double>(), 1e-12);
    for (const int stage : pipe->local_stages())
      for (const auto& item : pipe->named_children()["stage" + std::to_string(stage)]->named_parameters())
        EXPECT_LE(difference(item.value().grad(), model[stage]->named_parameters()[item.key()].grad()), 1e-12);
  });
}

TEST(Gradients, HoldersAreBitwiseEqual) {
  const int num_ranks = 4;
  std::vector<std::map<std::string, at::Tensor>> seen(num_ranks);
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8}, as_factory(layer));
    pipe->step(random_batch(16, 3), squared_error());
    for (const auto& item : pipe->named_parameters()) seen[comm->rank()][item.key()] = item.value().grad().clone();
  });
  for (int rank = 0; rank < num_ranks; ++rank) {
    ASSERT_EQ(seen[rank].size(), seen[num_ranks - 1 - rank].size());
    for (const auto& [name, gradient] : seen[rank])
      EXPECT_TRUE(torch::equal(gradient, seen[num_ranks - 1 - rank].at(name))) << "rank " << rank << " " << name;
  }
}

TEST(Gradients, PredictAndEvaluateWithAnyNumberOfMicroBatches) {
  for (const std::string kind : {"dualpipe", "dualpipev", "1f1b", "interleaved"}) {
    const int num_ranks = 4;
    const int num_stages = make_schedule({kind, num_ranks, 8}).num_stages;
    run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8, .schedule = kind}, as_factory(layer));
      for (const int count : {1, 3, 8, 13}) {
        SCOPED_TRACE(kind + ", " + std::to_string(count) + " micro-batches");
        const Batch batch = random_batch(2 * count, 5 + count);
        const Reference expected = reference(layer, num_stages, batch, count, squared_error(), 1.0);
        const Batch pieces = Batch::from_micro_batches(split_batch(batch, count, 0));
        EXPECT_EQ(pipe->evaluate(pieces, squared_error()).micro_batch_losses(), expected.losses);
        const Tensors merged = pipe->predict(pieces);
        ASSERT_EQ(merged.size(), pipe->computes_loss() ? 1u : 0u);
        for (int m = 0; m < count && !merged.empty(); ++m)
          EXPECT_TRUE(torch::equal(merged[0].narrow(0, 2 * m, 2), expected.outputs[m][0]));
        for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
      }
    });
  }
}

}  // namespace
}  // namespace dualpipe::test
