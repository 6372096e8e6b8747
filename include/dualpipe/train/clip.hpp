#pragma once

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// Collective. Scales `.grad` of this rank's parameters such that the 2-norm over the whole model is at most
/// `max_norm`, with the factor max_norm / (norm + 1e-6) of torch.nn.utils.clip_grad_norm_. Sparse gradients are counted
/// and scaled as they are there. The host waits for the norm on a device as well. Where it throws, gradients are what they
/// were.
///
/// @param counted             parameters whose norm this rank adds; over all ranks each parameter of the model once.
/// @param parameters          parameters to scale: all of this rank's.
/// @param error_if_nonfinite  on any rank: a norm that is infinite or NaN is an error.
/// @return                    the norm before clipping, zero-dimensional, float64, bitwise the same on every rank.
/// @throws InvalidArgument    on every rank, naming the one that found it: `max_norm` is negative or NaN, a gradient is
///                            neither dense nor sparse, or expanded. On every rank: a norm that is not finite, with
///                            `error_if_nonfinite`. The communicator stays usable.
/// @throws CommError          as the all_reduce of the norm.
DUALPIPE_DECL at::Tensor clip_grad_norm(Communicator& communicator, const Tensors& counted, const Tensors& parameters,
                                        double max_norm, bool error_if_nonfinite = false);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/train/clip.ipp"
#endif
