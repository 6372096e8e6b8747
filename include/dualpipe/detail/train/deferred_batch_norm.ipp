#pragma once

#include "dualpipe/train/deferred_batch_norm.hpp"

#include <ATen/ATen.h>

#include <memory>

#include "dualpipe/error.hpp"

namespace dualpipe {

DeferredBatchNormImpl::DeferredBatchNormImpl(const torch::nn::BatchNormOptions& options)
    : torch::nn::Module("DeferredBatchNorm"), options_(options) {
  DUALPIPE_CHECK(options.track_running_stats(),
                 "DeferredBatchNorm is for running statistics; without them take torch::nn::BatchNorm");
  const std::int64_t features = options.num_features();
  if (options.affine()) {
    weight = register_parameter("weight", at::ones({features}));
    bias = register_parameter("bias", at::zeros({features}));
  }
  running_mean = register_buffer("running_mean", at::zeros({features}));
  running_var = register_buffer("running_var", at::ones({features}));
  num_batches_tracked = register_buffer("num_batches_tracked", at::zeros({}, at::kLong));
  batch_sums = register_buffer("batch_sums", at::zeros({3, features}, at::kDouble));
}

at::Tensor DeferredBatchNormImpl::forward(const at::Tensor& input) {
  DUALPIPE_CHECK(input.dim() >= 2 && input.size(1) == options_.num_features(), "DeferredBatchNorm of ",
                 options_.num_features(), " features takes [samples, features, ...], got ", input.sizes());
  if (!is_training())
    return at::batch_norm(input, weight, bias, running_mean, running_var, false, 0, options_.eps(), true);
  {
    const at::NoGradGuard no_grad;
    const at::Tensor values = input.detach().to(at::kDouble).transpose(0, 1).flatten(1);
    batch_sums.add_(at::stack({values.sum(1), values.square().sum(1), at::full_like(batch_sums[2], values.size(1))}));
  }
  return at::batch_norm(input, weight, bias, {}, {}, true, 0, options_.eps(), true);
}

void DeferredBatchNormImpl::commit() {
  const at::NoGradGuard no_grad;
  const auto count = batch_sums[2][0].item<double>();
  if (count == 0) return;
  num_batches_tracked.add_(1);
  const double momentum = options_.momentum().value_or(1 / num_batches_tracked.item<double>());
  const at::Tensor mean = batch_sums[0] / count;
  // Unbiased, as torch has it.
  const at::Tensor variance = (batch_sums[1] / count - mean.square()).clamp_min(0) * (count / (count - 1));
  running_mean.lerp_(mean.to(running_mean.scalar_type()), momentum);
  running_var.lerp_(variance.to(running_var.scalar_type()), momentum);
  batch_sums.zero_();
}

void DeferredBatchNormImpl::to(at::Device device, at::ScalarType dtype, bool non_blocking) {
  const at::Tensor sums = batch_sums.to(device, at::kDouble);
  torch::nn::Module::to(device, dtype, non_blocking);
  batch_sums.set_data(sums);
}

void DeferredBatchNormImpl::to(at::ScalarType dtype, bool non_blocking) {
  to(batch_sums.device(), dtype, non_blocking);
}

void commit_batch_norms(const torch::nn::Module& module) {
  for (const std::shared_ptr<torch::nn::Module>& each : module.modules(/*include_self=*/false))
    if (auto* const norm = each->as<DeferredBatchNormImpl>()) norm->commit();
}

}  // namespace dualpipe
