#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe {

struct LocalOptions {
  std::chrono::milliseconds timeout = std::chrono::minutes(5);  ///< longest wait of one operation
};

/// Communicators of `num_ranks` ranks that are threads of this process; element r belongs to rank r. Tensors that only
/// the sender's transfer holds change hands without a copy; others are copied by the receiver.
std::vector<std::shared_ptr<Communicator>> local_communicators(int num_ranks, const LocalOptions& options = {});

/// Runs `body` on one thread per rank with a local communicator and joins them all. When one throws, its communicator
/// is aborted, so that the others end too; rethrows the first failure (the one that came first in time, a rank's own
/// error before a CommError it caused).
void run_ranks(int num_ranks, const std::function<void(std::shared_ptr<Communicator>)>& body,
               const LocalOptions& options = {});

}  // namespace dualpipe
