#pragma once

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe {

/// Collective. Scales `.grad` of this rank's parameters such that the 2-norm over the whole model is at most
/// `max_norm`, with the factor max_norm / (norm + 1e-6) of torch.nn.utils.clip_grad_norm_. The host waits for the norm
/// on a device as well: gradients are what they were where it throws.
///
/// @param counted     parameters whose norm this rank adds; over all ranks each parameter of the model once.
/// @param parameters  parameters to scale: all of this rank's.
/// @return            the norm before clipping, zero-dimensional, float64, bitwise the same on every rank.
/// @throws InvalidArgument  max_norm is negative or NaN.
/// @throws CommError        as the all_reduce of the norm.
at::Tensor clip_grad_norm(Communicator& communicator, const Tensors& counted, const Tensors& parameters,
                          double max_norm);

}  // namespace dualpipe
