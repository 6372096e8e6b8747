#pragma once

#include "dualpipe/train/learning_rate.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace detail {

inline void check_learning_rate(const LearningRate& rate, std::int64_t step) {
  DUALPIPE_CHECK(step >= 0, "steps count from 0, got ", step);
  DUALPIPE_CHECK(rate.peak >= 0 && rate.least >= 0 && std::isfinite(rate.peak) && std::isfinite(rate.least),
                 "learning rates must be >= 0 and finite, got peak ", rate.peak, " and least ", rate.least);
  DUALPIPE_CHECK(rate.warm_up_steps >= 0 && rate.decay_steps >= 0,
                 "phases of a learning rate have >= 0 steps, got warm_up_steps ", rate.warm_up_steps,
                 " and decay_steps ", rate.decay_steps);
}

/// The share of the peak that a warm-up has reached.
inline double warm_up_factor(const LearningRate& rate, std::int64_t step) {
  if (step >= rate.warm_up_steps) return 1;
  return static_cast<double>(step + 1) / static_cast<double>(rate.warm_up_steps);
}

/// From 0 at `begin` to 1 at `end` and after it.
inline double progress(std::int64_t step, std::int64_t begin, std::int64_t end) {
  if (step >= end) return 1;
  return step <= begin ? 0 : static_cast<double>(step - begin) / static_cast<double>(end - begin);
}

}  // namespace detail

double warm_up(const LearningRate& rate, std::int64_t step) {
  detail::check_learning_rate(rate, step);
  return rate.peak * detail::warm_up_factor(rate, step);
}

double cosine(const LearningRate& rate, std::int64_t step) {
  detail::check_learning_rate(rate, step);
  DUALPIPE_CHECK(rate.steps >= rate.warm_up_steps, "a run of ", rate.steps, " steps is shorter than its warm-up of ",
                 rate.warm_up_steps);
  if (step < rate.warm_up_steps) return warm_up(rate, step);
  const double angle = std::numbers::pi * detail::progress(step, rate.warm_up_steps, rate.steps);
  return rate.least + (rate.peak - rate.least) * (1 + std::cos(angle)) / 2;
}

double warm_up_stable_decay(const LearningRate& rate, std::int64_t step) {
  detail::check_learning_rate(rate, step);
  DUALPIPE_CHECK(rate.steps - rate.decay_steps >= rate.warm_up_steps, "a run of ", rate.steps,
                 " steps is shorter than its warm-up of ", rate.warm_up_steps, " and its decay of ", rate.decay_steps);
  if (step < rate.warm_up_steps) return warm_up(rate, step);
  return rate.peak + (rate.least - rate.peak) * detail::progress(step, rate.steps - rate.decay_steps, rate.steps);
}

void set_learning_rate(torch::optim::Optimizer& optimizer, double rate) {
  for (auto& group : optimizer.param_groups()) group.options().set_lr(rate);
}

}  // namespace dualpipe
