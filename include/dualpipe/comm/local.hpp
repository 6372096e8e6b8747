#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe {

struct LocalOptions {
  std::chrono::milliseconds timeout = std::chrono::minutes(5);  ///< longest wait of one operation
  /// Of the tensors that travel: the CPU, or one device that all ranks share. Without an index: the current one.
  at::Device device = at::kCPU;
};

/// Communicators of `num_ranks` ranks that are threads of this process; element r belongs to rank r. The receiver
/// copies the tensors, but those that the sender has given up change hands without a copy.
///
/// On a device, events order the work of all streams: a send takes its tensors as the current stream leaves them, and
/// wait() makes the then current stream wait. Memory changes hands only between threads with the same current stream;
/// between streams it is copied when the receiver waits. Spans are CPU times.
///
/// @throws InvalidArgument  no ranks, no positive timeout, or a device that this program or machine does not have.
DUALPIPE_DECL std::vector<std::shared_ptr<Communicator>> local_communicators(int num_ranks,
                                                                             const LocalOptions& options = {});

/// Runs `body` on one thread per rank with a local communicator and its device current, and joins the threads. A rank
/// that throws aborts its communicator, so that the others end too. Rethrows the first failure in time, but a rank's
/// own error before the CommErrors that it caused.
DUALPIPE_DECL void run_ranks(int num_ranks, const std::function<void(std::shared_ptr<Communicator>)>& body,
                             const LocalOptions& options = {});

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/comm/local.ipp"
#endif
