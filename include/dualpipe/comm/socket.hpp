#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <memory>
#include <string>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/launch/world.hpp"

namespace dualpipe {

struct ConnectOptions {
  std::string name = "dualpipe";  ///< distinguishes the communicators of one run; the same on all ranks
  int epoch = 0;                  ///< raise it to connect again after a failure
  std::chrono::milliseconds timeout = std::chrono::minutes(5);  ///< longest wait of one operation, connecting included
  /// Where the ranks find each other. None: a TCPStore at the world's master address; the launcher serves it, or else
  /// rank 0 until its process ends.
  c10::intrusive_ptr<c10d::Store> store = {};
};

/// Connects the processes of `world` with each other: Unix domain sockets within a host, TCP across hosts. One I/O
/// thread per call moves the bytes; no user code runs on it. Tensors are on the CPU. Collective over the world. A
/// program may connect several times: at the same time under different names, one after the other with rising epochs.
///
/// A process that is killed ends the operations of all others at once, with its rank as the origin. A process that
/// hangs ends them at the timeout of an operation.
///
/// @throws InvalidArgument  no master port although there are several ranks.
/// @throws CommError        a rank did not come within the timeout (the text names the missing ones), or the system has
///                          no more descriptors or threads.
std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options = {});

}  // namespace dualpipe
