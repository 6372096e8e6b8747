#pragma once

#include <ATen/ATen.h>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe::detail {

/// Collective: the end of a step. Returns after every rank's host has reached it and everything announced before
/// matches.
///
/// @return  [num_micro_batches] float64 in memory of the host: the losses of all micro-batches, valid when the device
///          has finished what it was given.
inline at::Tensor vote(Communicator& communicator, const RunOutputs& outputs, int num_micro_batches) {
  at::Tensor losses = at::zeros({num_micro_batches}, at::device(communicator.device()).dtype(at::kDouble));
  for (const auto& [micro_batch, loss] : outputs.losses) losses[micro_batch].copy_(loss.reshape({}));
  // Where devices move the tensors, all_reduce alone says nothing about the hosts.
  Communicator& hosts = communicator.control();
  Pending arrived = &hosts == &communicator ? Pending() : hosts.barrier();
  communicator.all_reduce({losses}).wait();
  at::Tensor on_host = losses.to(at::kCPU, /*non_blocking=*/true);
  if (arrived) arrived.wait();
  return on_host;
}

}  // namespace dualpipe::detail
