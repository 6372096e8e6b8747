#pragma once

#include "dualpipe/train/clip.hpp"

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>

#include <cmath>
#include <string>

#include "dualpipe/detail/comm/agree.hpp"

namespace dualpipe {
namespace detail {

/// @throws InvalidArgument  the gradient cannot be scaled in place.
inline void check_clippable(const at::Tensor& parameter) {
  const at::Tensor& gradient = parameter.grad();
  if (!gradient.defined() || gradient.is_sparse()) return;
  DUALPIPE_CHECK(gradient.layout() == at::kStrided,
                 "clip_grad_norm_ takes dense and sparse gradients, but that of a parameter of sizes ",
                 parameter.sizes(), " has layout ", gradient.layout(), "; clip what it trains by hand");
  DUALPIPE_CHECK(at::has_internal_overlap(gradient) != at::MemOverlap::Yes,
                 "clip_grad_norm_ scales gradients in place, but that of a parameter of sizes ", parameter.sizes(),
                 " is expanded: several of its elements share memory; give it a clone()");
}

}  // namespace detail

at::Tensor clip_grad_norm(Communicator& communicator, const Tensors& counted, const Tensors& parameters,
                          double max_norm, bool error_if_nonfinite) {
  at::NoGradGuard no_grad;
  // The sum of squares, and the numbers of ranks that found something wrong, as no rank waits for one that has thrown,
  // and of those that take no norm which is not finite.
  at::Tensor sums = at::zeros({3}, at::TensorOptions().dtype(at::kDouble).device(communicator.device()));
  const std::string finding = detail::finding_of([&] {
    DUALPIPE_CHECK(max_norm >= 0, "clip_grad_norm_ needs max_norm >= 0, got ", max_norm);
    for (const at::Tensor& parameter : parameters) detail::check_clippable(parameter);
    at::Tensor squares = sums[0];
    for (const at::Tensor& parameter : counted) {
      detail::check_clippable(parameter);
      at::Tensor gradient = parameter.grad();
      if (!gradient.defined()) continue;
      if (gradient.is_sparse()) gradient = gradient.coalesce()._values();
      squares += at::linalg_vector_norm(gradient, 2, {}, false, at::kDouble).square();
    }
  });
  if (!finding.empty()) sums[1].fill_(1);
  if (error_if_nonfinite) sums[2].fill_(1);
  communicator.all_reduce({sums}).synchronize();  // no gradient is scaled by what an abort has left behind
  if (sums[1].item<double>() > 0) detail::agree_that_fine(communicator, finding);

  const at::Tensor norm = sums[0].sqrt();
  DUALPIPE_CHECK(sums[2].item<double>() == 0 || std::isfinite(norm.item<double>()), "the norm of the gradients is ",
                 norm.item<double>(),
                 ", so they cannot be clipped; with error_if_nonfinite = false they are scaled by it all the same");
  const at::Tensor factor = (max_norm / (norm + 1e-6)).clamp_max(1.0);
  for (const at::Tensor& parameter : parameters) {
    at::Tensor gradient = parameter.grad();
    if (!gradient.defined()) continue;
    if (gradient.is_sparse()) gradient = gradient._values();
    gradient.mul_(factor.to(gradient.scalar_type()));
  }
  return norm;
}

}  // namespace dualpipe
