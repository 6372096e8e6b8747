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
  /// Ranks tell each other all the time that they live. One that has been silent for so long is stopped, or its host or
  /// network has failed: it ends the operations of all. A rank that computes is not silent, one in a debugger is. At
  /// least 100 ms; 0: nobody looks.
  std::chrono::milliseconds liveness = std::chrono::seconds(10);
  /// Where the ranks find each other. None: a TCPStore at the world's master address; the launcher serves it, or else
  /// rank 0 until its process ends.
  c10::intrusive_ptr<c10d::Store> store = {};
};

/// Connects the processes of `world` with each other: Unix domain sockets within a host, TCP across hosts. One I/O
/// thread per call moves the bytes; no user code runs on it. Tensors are on the CPU. Collective over the world. A
/// program may connect several times: at the same time under different names, one after the other with rising epochs.
///
/// A process that is killed ends the operations of all others at once, with its rank as the origin; one that is stopped,
/// or cannot be reached, after ConnectOptions::liveness; one whose own code hangs at the timeout of an operation.
///
/// @throws InvalidArgument  no master port although there are several ranks.
/// @throws CommError        a rank did not come within the timeout (the text names the missing ones), or the system has
///                          no more descriptors or threads.
std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options = {});

}  // namespace dualpipe
