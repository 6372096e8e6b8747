#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/options/batchnorm.h>
#include <torch/nn/pimpl.h>

#include <cstdint>

#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// Batch normalization whose running statistics are those of whole batches: all micro-batches of a step, on all ranks
/// and in all replicas, move them on once, by `momentum`. In training each micro-batch is normalized by its own mean
/// and variance, as torch::nn::BatchNorm does it.
///
///     DualPipe pipe(comm, {.num_micro_batches = 8, .buffers = {{"batch_sums", BufferReduction::sum}}}, factory);
///     pipe->step(batch, loss);
///     commit_batch_norms(*pipe);
///
/// Takes [samples, features, …] of any number of dimensions. Names of parameters and buffers are those of
/// torch::nn::BatchNorm, and `batch_sums`.
class DeferredBatchNormImpl : public torch::nn::Module {
 public:
  explicit DeferredBatchNormImpl(std::int64_t features)
      : DeferredBatchNormImpl(torch::nn::BatchNormOptions(features)) {}
  /// @throws InvalidArgument  track_running_stats(false).
  DUALPIPE_DECL explicit DeferredBatchNormImpl(const torch::nn::BatchNormOptions& options);

  DUALPIPE_DECL torch::Tensor forward(const torch::Tensor& input);
  /// Moves the running statistics on by what came since it was called last; does nothing if nothing has.
  DUALPIPE_DECL void commit();

  // The sums stay what they are.
  DUALPIPE_DECL void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  DUALPIPE_DECL void to(torch::Dtype dtype, bool non_blocking = false) override;
  using torch::nn::Module::to;

  torch::Tensor weight, bias;  ///< undefined without affine()
  torch::Tensor running_mean, running_var, num_batches_tracked;
  torch::Tensor batch_sums;  ///< float64 [3, features]: of the values, of their squares, and how many there were

 private:
  torch::nn::BatchNormOptions options_;
};
TORCH_MODULE(DeferredBatchNorm);

/// Calls commit() of all such modules within, on all ranks after each step.
DUALPIPE_DECL void commit_batch_norms(const torch::nn::Module& module);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/train/deferred_batch_norm.ipp"
#endif
