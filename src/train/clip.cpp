#include "dualpipe/train/clip.hpp"

#include <ATen/ATen.h>

namespace dualpipe {

at::Tensor clip_grad_norm(Communicator& communicator, const Tensors& counted, const Tensors& parameters,
                          double max_norm) {
  DUALPIPE_CHECK(max_norm >= 0, "clip_grad_norm_ needs max_norm >= 0, got ", max_norm);
  at::NoGradGuard no_grad;
  at::Tensor squares = at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(communicator.device()));
  for (const at::Tensor& parameter : counted)
    if (parameter.grad().defined())
      squares += at::linalg_vector_norm(parameter.grad(), 2, {}, false, at::kDouble).square();
  communicator.all_reduce({squares}).synchronize();  // no gradient is scaled by what an abort has left behind
  const at::Tensor norm = squares.sqrt();
  const at::Tensor factor = (max_norm / (norm + 1e-6)).clamp_max(1.0);
  for (const at::Tensor& parameter : parameters)
    if (parameter.grad().defined()) parameter.grad().mul_(factor.to(parameter.grad().scalar_type()));
  return norm;
}

}  // namespace dualpipe
