#pragma once

#include <cmath>
#include <numeric>
#include <tuple>

#include "dualpipe/schedule/generate.hpp"
#include "pipeline/pipeline.hpp"

// Batches whose micro-batches count differently, and what one process makes of them.
namespace dualpipe::test {

/// A layer, and the losses that it adds: two in the second stage, one in the last. Rows of zeros have an infinite
/// derivative in the second. Every second stage is computed again.
inline at::Tensor balanced_layer(Layer& module, int number, int num_stages, const at::Tensor& x, Tensors& added) {
  at::Tensor y = module->forward(number == 1 ? torch::sqrt(x.pow(2)) : x);
  if (number == 0) y = y * x.ne(0);
  if (number == 1 || number == num_stages - 1) added.push_back(0.1 * y.pow(2).mean());
  if (number == 1) added.push_back(0.01 * y.mean().to(torch::kFloat));
  return y;
}

inline Stage balanced_stage(int number, int num_stages) {
  Layer module(number);
  return Stage(module.ptr())
      .recompute(number % 2 == 1)
      .compute("layer", [=](const Tensors& x, const StageContext& context) mutable {
        Tensors added;
        const at::Tensor y = balanced_layer(module, number, num_stages, x[0], added);
        for (const at::Tensor& loss : added) context.add_loss(loss);
        return Tensors{y};
      });
}

/// The mean over the rows that count, NaN where none does; and behind it how many count, and how many are positive.
inline LossFn masked_loss() {
  return [](const Tensors& outputs, const Tensors& targets) {
    const at::Tensor count = targets[1].sum();
    const at::Tensor each = (outputs[0] - targets[0]).pow(2).mean(1);
    return std::tuple((each * targets[1]).sum() / count, count.to(torch::kLong), outputs[0].gt(0).sum());
  };
}

/// Two of three rows count. With `empty`, rows 2 and 3 are zeros, and do not.
inline Batch masked_batch(int rows, std::uint64_t seed, bool empty) {
  Batch batch = random_batch(rows, seed);
  at::Tensor mask = torch::arange(rows).remainder(3).ne(1).to(torch::kDouble);
  if (empty) {
    mask.slice(0, 2, 4).zero_();
    batch.inputs[0].slice(0, 2, 4).zero_();
  }
  batch.targets.push_back(mask);
  return batch;
}

/// By the rows that count.
inline std::vector<double> weights_of(const std::vector<Batch>& micro_batches) {
  std::vector<double> weights;
  for (const Batch& each : micro_batches) weights.push_back(each.targets[1].sum().item<double>());
  return weights;
}

struct WeightedTruth {
  double loss = 0;
  std::vector<double> losses;
  at::Tensor metrics, added_losses;
  std::map<int, std::map<std::string, at::Tensor>> gradients;
};

/// @param micro_batches  of all replicas.
inline WeightedTruth weighted_truth(int num_stages, const std::vector<Batch>& micro_batches,
                                    const std::vector<double>& weights) {
  WeightedTruth truth;
  truth.metrics = torch::zeros({2}, f64());
  truth.added_losses = torch::zeros({num_stages}, f64());
  std::vector<Layer> model;
  for (int s = 0; s < num_stages; ++s) model.emplace_back(s);
  const double all = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (std::size_t m = 0; m < micro_batches.size(); ++m) {
    Tensors x = micro_batches[m].inputs;
    at::Tensor total;
    for (int s = 0; s < num_stages; ++s) {
      Tensors added;
      x = {balanced_layer(model[s], s, num_stages, x[0], added)};
      for (const at::Tensor& loss : added) {
        if (weights[m] == 0) continue;
        truth.added_losses[s] += loss.detach().to(torch::kDouble) * weights[m] / all;
        total = total.defined() ? total + loss : loss;
      }
    }
    const Tensors values = masked_loss().values(x, micro_batches[m].targets);
    truth.losses.push_back(values[0].item<double>());
    truth.metrics += torch::stack({values[1].to(torch::kDouble), values[2].to(torch::kDouble)});
    if (weights[m] == 0) continue;
    truth.loss += values[0].item<double>() * weights[m] / all;
    ((values[0] + total) * (weights[m] / all)).backward();
  }
  for (int s = 0; s < num_stages; ++s)
    for (const auto& item : model[s]->named_parameters()) truth.gradients[s][item.key()] = item.value().grad().clone();
  return truth;
}

inline void expect_result(const StepResult& result, const WeightedTruth& truth) {
  EXPECT_NEAR(result.loss.item<double>(), truth.loss, 1e-12);
  const std::vector<double> losses = result.micro_batch_losses();
  ASSERT_EQ(losses.size(), truth.losses.size());
  for (std::size_t m = 0; m < losses.size(); ++m)
    EXPECT_TRUE(std::isnan(truth.losses[m]) ? std::isnan(losses[m]) : std::abs(losses[m] - truth.losses[m]) < 1e-12)
        << "micro-batch " << m << ": " << losses[m] << ", not " << truth.losses[m];
  EXPECT_TRUE(torch::equal(result.metrics, truth.metrics)) << result.metrics << truth.metrics;
  EXPECT_LE(difference(result.added_losses, truth.added_losses), 1e-12) << result.added_losses;
}

/// Several steps with whole batches, some of whose micro-batches do not count, and with batches that are cut into other
/// numbers of micro-batches.
inline void expect_batches_as_in_one_process(const Mesh& mesh, const std::string& kind) {
  const int num_ranks = mesh.pipeline()->size(), N = 2 * num_ranks, D = mesh.shape().data;
  const int num_stages = make_schedule({kind, num_ranks, N}).num_stages;
  DualPipe pipe(mesh, {.num_micro_batches = N, .schedule = kind},
                [&](int number) { return balanced_stage(number, num_stages); });
  for (const int count : {N, 3, 1, N + 1, N}) {
    SCOPED_TRACE(kind + ", " + std::to_string(count) + " micro-batches");
    const bool whole = count == N;
    std::vector<Batch> all;
    Batch mine;
    for (int replica = 0; replica < D; ++replica) {
      Batch batch = masked_batch(whole ? 2 * N : 3 * count - (count > 1), 10 + replica, whole);
      if (!whole) batch = batch.chunk(count);
      const std::vector<Batch> parts = split_batch(batch, count, 0);
      batch.weights = weights_of(parts);
      all.insert(all.end(), parts.begin(), parts.end());
      if (replica == mesh.replica()) mine = batch;
    }
    const std::vector<double> weights = weights_of(all);
    EXPECT_EQ(std::count(weights.begin(), weights.end(), 0.0), whole ? D : 0);
    const WeightedTruth truth = weighted_truth(num_stages, all, weights);
    // The other ranks hear the weights.
    if (!pipe->computes_loss()) mine.weights.clear();
    pipe->zero_grad();
    expect_result(pipe->step(mine, masked_loss()), truth);
    for (const int stage : pipe->local_stages())
      for (const auto& item : pipe->named_children()["stage" + std::to_string(stage)]->named_parameters())
        EXPECT_LE(difference(item.value().grad(), truth.gradients.at(stage).at(item.key())), 1e-12)
            << "stage " << stage << " " << item.key();
    expect_result(pipe->evaluate(mine, masked_loss()), truth);
  }
}

}  // namespace dualpipe::test
