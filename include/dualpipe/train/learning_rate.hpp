#pragma once

#include <torch/optim/optimizer.h>

#include <cstdint>

#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// A learning rate that rises, then falls. Steps count from 0, so the first step of a warm-up of n trains with 1/n of
/// the peak, and step n - 1 with the peak.
struct LearningRate {
  double peak = 1e-3;
  double least = 0;  ///< after the last step
  std::int64_t warm_up_steps = 0;
  std::int64_t steps = 0;        ///< of the whole run
  std::int64_t decay_steps = 0;  ///< of warm_up_stable_decay, at the end
};

/// Up to the peak, which stays.
///
/// @throws InvalidArgument  here and below: a negative step or rate, phases that are longer than the run.
DUALPIPE_DECL double warm_up(const LearningRate& rate, std::int64_t step);
/// Up to the peak, then along half a cosine to `least`, which stays after `steps`.
DUALPIPE_DECL double cosine(const LearningRate& rate, std::int64_t step);
/// Up to the peak, there until the last `decay_steps`, and then along a straight line to `least`, which stays.
DUALPIPE_DECL double warm_up_stable_decay(const LearningRate& rate, std::int64_t step);

/// Sets it in all parameter groups.
DUALPIPE_DECL void set_learning_rate(torch::optim::Optimizer& optimizer, double rate);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/train/learning_rate.ipp"
#endif
