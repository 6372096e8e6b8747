#include "dualpipe/train/learning_rate.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <vector>

#include "error_of.hpp"

namespace dualpipe {
namespace {

using test::error_of;
using ::testing::DoubleNear;
using ::testing::HasSubstr;
using ::testing::Pointwise;

using Schedule = double (*)(const LearningRate&, std::int64_t);

std::vector<double> first(int count, Schedule schedule, const LearningRate& rate) {
  std::vector<double> values;
  for (int step = 0; step < count; ++step) values.push_back(schedule(rate, step));
  return values;
}
auto near(const std::vector<double>& values) { return Pointwise(DoubleNear(1e-15), values); }

TEST(LearningRate, WarmUpRisesInEqualParts) {
  EXPECT_THAT(first(6, warm_up, {.peak = 2, .warm_up_steps = 4}), near({0.5, 1, 1.5, 2, 2, 2}));
  EXPECT_THAT(first(2, warm_up, {.peak = 2}), near({2, 2}));
}

TEST(LearningRate, CosineIsThatOfPyTorch) {
  // torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=0.2) of a rate of 1, and it stays at the end.
  const double half = 0.7071067811865476;
  EXPECT_THAT(first(7, cosine, {.peak = 1, .least = 0.2, .steps = 4}),
              near({1, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half, 0.2, 0.2, 0.2}));
  EXPECT_THAT(first(7, cosine, {.peak = 1, .warm_up_steps = 2, .steps = 6}),
              near({0.5, 1, 1, 0.5 + 0.5 * half, 0.5, 0.5 - 0.5 * half, 0}));
}

TEST(LearningRate, WarmUpStableDecayIsThreeLines) {
  EXPECT_THAT(
      first(10, warm_up_stable_decay, {.peak = 1, .least = 0.5, .warm_up_steps = 2, .steps = 8, .decay_steps = 4}),
      near({0.5, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5}));
}

TEST(LearningRate, WhatCannotBeIsNamed) {
  EXPECT_THAT(error_of([] { warm_up({}, -1); }), HasSubstr("-1"));
  EXPECT_THAT(error_of([] { warm_up({.peak = -0.5}, 0); }), HasSubstr("-0.5"));
  EXPECT_THAT(error_of([] { warm_up({.warm_up_steps = -3}, 0); }), HasSubstr("-3"));
  EXPECT_THAT(error_of([] { cosine({.warm_up_steps = 5, .steps = 4}, 0); }), HasSubstr("4 steps"));
  EXPECT_THAT(error_of([] { warm_up_stable_decay({.warm_up_steps = 5, .steps = 9, .decay_steps = 5}, 0); }),
              HasSubstr("decay of 5"));
}

TEST(LearningRate, IsSetInAllGroups) {
  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (int i = 0; i < 2; ++i) groups.emplace_back(std::vector<torch::Tensor>{torch::ones({1})});
  torch::optim::SGD optimizer(groups, torch::optim::SGDOptions(1));
  set_learning_rate(optimizer, 0.25);
  for (const auto& group : optimizer.param_groups()) EXPECT_EQ(group.options().get_lr(), 0.25);
}

}  // namespace
}  // namespace dualpipe
