#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe {

struct LocalOptions {
  std::chrono::milliseconds timeout = std::chrono::minutes(5);  ///< longest wait of one operation
  /// Where the tensors are that travel: the CPU, or one device that all ranks share. Without an index: the current one.
  at::Device device = at::kCPU;
};

/// Communicators of `num_ranks` ranks that are threads of this process; element r belongs to rank r. Tensors that only
/// the sender's transfer holds change hands without a copy; others are copied by the receiver.
///
/// On a device everything is ordered by events, whatever stream is current in which thread and when: a send takes its
/// tensors as the current stream leaves them, and wait() makes the stream wait that is current then. Memory changes
/// hands only between threads with the same current stream; between streams it is copied, once the receiver calls
/// wait(). Spans are those of the host.
///
/// @throws InvalidArgument  no ranks, no positive timeout, or a device that this program or machine does not have.
std::vector<std::shared_ptr<Communicator>> local_communicators(int num_ranks, const LocalOptions& options = {});

/// Runs `body` on one thread per rank with a local communicator, the device current, and joins them all. When one
/// throws, its communicator is aborted, so that the others end too; rethrows the first failure (the one that came first
/// in time, a rank's own error before a CommError it caused).
void run_ranks(int num_ranks, const std::function<void(std::shared_ptr<Communicator>)>& body,
               const LocalOptions& options = {});

}  // namespace dualpipe
