#pragma once

#include "dualpipe/train/grad_scaler.hpp"

#include <ATen/ATen.h>

#include <cmath>
#include <string>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/widened.hpp"

namespace dualpipe {
namespace detail {

inline bool finite_in_float32(double value) { return std::isfinite(static_cast<float>(value)); }

/// @throws InvalidArgument
inline void check_scale(double scale) {
  DUALPIPE_CHECK(scale > 0 && finite_in_float32(scale),
                 "GradScaler needs a scale that is positive and finite in float32, got ", scale);
}

/// @throws InvalidArgument
inline void check_options(const GradScalerOptions& options) {
  check_scale(options.scale);
  DUALPIPE_CHECK(options.growth > 1 && finite_in_float32(options.growth), "GradScaler needs a growth above 1, got ",
                 options.growth);
  DUALPIPE_CHECK(options.backoff > 0 && options.backoff < 1, "GradScaler needs a backoff between 0 and 1, got ",
                 options.backoff);
  DUALPIPE_CHECK(options.growth_interval >= 1, "GradScaler needs a growth_interval of at least 1, got ",
                 options.growth_interval);
}

/// What is divided by the scale.
///
/// @throws InvalidArgument
inline Tensors scaled_gradients(const Tensors& parameters) {
  Tensors gradients;
  for (const at::Tensor& parameter : parameters) {
    at::Tensor gradient = parameter.grad();
    if (!gradient.defined()) continue;
    DUALPIPE_CHECK(gradient.scalar_type() != at::kHalf, "the gradient of a parameter of sizes ", parameter.sizes(),
                   " is in float16, where dividing it by the scale would make zeros of small values; set "
                   "DualPipeOptions::gradient_dtype to float32");
    DUALPIPE_CHECK(gradient.layout() == at::kStrided || gradient.is_sparse(),
                   "GradScaler takes dense and sparse gradients, but that of a parameter of sizes ", parameter.sizes(),
                   " has layout ", gradient.layout());
    gradients.push_back(gradient.is_sparse() ? gradient._values() : gradient);
  }
  return gradients;
}

}  // namespace detail

GradScaler::GradScaler(std::shared_ptr<Communicator> world, const GradScalerOptions& options)
    : world_(std::move(world)), options_(options) {
  DUALPIPE_CHECK(world_ != nullptr, "GradScaler needs a communicator");
  detail::agree_that_fine(*world_, detail::finding_of([&] { detail::check_options(options_); }));
  detail::agree_on(*world_, "options of GradScaler",
                   detail::str("scale ", options_.scale, ", growth ", options_.growth, ", backoff ", options_.backoff,
                               ", growth_interval ", options_.growth_interval));
  scale_ = at::full({1}, options_.scale, at::kFloat);
  growth_tracker_ = at::zeros({1}, at::kInt);
}

at::Tensor GradScaler::scale(const at::Tensor& loss) const {
  if (!loss.defined() || !loss.requires_grad()) return loss;
  const at::ScalarType wide = detail::widened(loss.scalar_type());
  // With a place in the graph of its own.
  const at::Tensor result = wide == loss.scalar_type() ? at::alias(loss) : loss.to(wide);
  result.register_hook([factor = current_scale()](const at::Tensor& gradient) { return gradient * factor; });
  return result;
}

bool GradScaler::unscale_(const Tensors& parameters, bool skipped) {
  const at::NoGradGuard no_grad;
  const auto on_device = at::TensorOptions().device(world_->device());
  at::Tensor infinite = at::zeros({1}, on_device.dtype(at::kFloat));
  Tensors gradients;
  const std::string finding = detail::finding_of([&] {
    DUALPIPE_CHECK(!found_infinite_.defined(), "GradScaler::unscale_() was called before, and update() has not been");
    gradients = detail::scaled_gradients(parameters);
  });
  // What each rank found wrong, how many gradients it has, whether its step was skipped.
  at::Tensor counts = at::zeros({3}, on_device.dtype(at::kFloat));
  if (!finding.empty()) counts[0].fill_(1);
  counts[1].fill_(static_cast<double>(gradients.size()));
  if (skipped) counts[2].fill_(1);
  world_->all_reduce({counts}).synchronize();
  counts = counts.cpu();
  const float* const all = counts.const_data_ptr<float>();
  if (all[0] > 0) detail::agree_that_fine(*world_, finding);
  DUALPIPE_CHECK(all[1] > 0 || all[2] > 0,
                 "no rank has a gradient to divide by the scale; call unscale_() after step(), with "
                 "StepResult::skipped where on_non_finite is skip");

  const at::Tensor inverse = at::full({1}, 1 / current_scale(), infinite.options());
  Tensors doubles, others;
  for (const at::Tensor& gradient : gradients)
    (gradient.scalar_type() == at::kDouble ? doubles : others).push_back(gradient);
  if (!others.empty()) at::_amp_foreach_non_finite_check_and_unscale_(others, infinite, inverse);
  for (const at::Tensor& gradient : doubles) {
    if (!gradient.isfinite().all().item<bool>()) infinite.fill_(1);
    gradient.mul_(1 / current_scale());
  }
  world_->all_reduce({infinite}).synchronize();
  const bool found = all[2] > 0 || infinite.item<float>() > 0;
  found_infinite_ = at::full({1}, found ? 1.0 : 0.0, at::kFloat);
  return !found;
}

void GradScaler::update() {
  DUALPIPE_CHECK(found_infinite_.defined(), "GradScaler::update() needs unscale_() before it");
  at::_amp_update_scale_(scale_, growth_tracker_, std::exchange(found_infinite_, at::Tensor()), options_.growth,
                         options_.backoff, options_.growth_interval);
}

double GradScaler::current_scale() const { return scale_.item<float>(); }

std::int64_t GradScaler::growth_tracker() const { return growth_tracker_.item<int>(); }

void GradScaler::restore(double scale, std::int64_t growth_tracker) {
  detail::check_scale(scale);
  DUALPIPE_CHECK(growth_tracker >= 0, "GradScaler needs a growth_tracker >= 0, got ", growth_tracker);
  scale_.fill_(scale);
  growth_tracker_.fill_(growth_tracker);
}

}  // namespace dualpipe
