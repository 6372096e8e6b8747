#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe::detail {

/// A micro-batch's loss, as it travels with the vote.
struct BallotLoss {
  std::int64_t micro_batch = 0;
  double loss = 0;
};

/// Collective: the end of a step, which is over on all ranks or on none; see Communicator::commit(). Whatever has
/// failed on this rank's device must have been found before.
///
/// @return  [num_micro_batches] float64 in memory of the host: the losses of all micro-batches.
inline at::Tensor vote(Communicator& communicator, const RunOutputs& outputs, int num_micro_batches) {
  Tensors own;
  for (const auto& [micro_batch, loss] : outputs.losses) own.push_back(loss.reshape({}).to(at::kDouble));
  const at::Tensor on_host = own.empty() ? at::Tensor() : at::stack(own).cpu();
  std::string ballot;
  for (const auto& [micro_batch, loss] : outputs.losses) {
    const BallotLoss mine{micro_batch, on_host.const_data_ptr<double>()[ballot.size() / sizeof(BallotLoss)]};
    ballot.append(reinterpret_cast<const char*>(&mine), sizeof mine);
  }
  at::Tensor losses = at::zeros({num_micro_batches}, at::kDouble);
  for (const std::string& each : communicator.commit(std::move(ballot))) {
    for (std::size_t at = 0; at < each.size(); at += sizeof(BallotLoss)) {
      BallotLoss loss;
      std::memcpy(&loss, each.data() + at, sizeof loss);
      losses.mutable_data_ptr<double>()[loss.micro_batch] = loss.loss;
    }
  }
  return losses;
}

/// As vote(), but the hosts do not wait for their devices.
///
/// @param end  gets what is over when the device has finished the step.
/// @return     as vote(), valid at the end.
inline at::Tensor vote_ahead(Communicator& communicator, const RunOutputs& outputs, int num_micro_batches,
                             Pending& end) {
  at::Tensor losses = at::zeros({num_micro_batches}, at::device(communicator.device()).dtype(at::kDouble));
  for (const auto& [micro_batch, loss] : outputs.losses) losses[micro_batch].copy_(loss.reshape({}));
  communicator.all_reduce({losses}).wait();
  at::Tensor on_host = losses.to(at::kCPU, /*non_blocking=*/true);
  end = communicator.fence();
  communicator.commit({});
  return on_host;
}

}  // namespace dualpipe::detail
