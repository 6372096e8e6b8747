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
  /// What crosses hosts is encrypted (TLS 1.3 with the secret of the job as its key). Needs World::secret; the same on
  /// all ranks. Costs processor time and two copies.
  bool encryption = false;
  /// Where rank 0 tells the others at which port it waits for them. None: at the world's master port, or, where the
  /// launcher serves a store there (torchrun), in that one.
  c10::intrusive_ptr<c10d::Store> store = {};
};

/// Connects the processes of `world` with each other: Unix domain sockets within a host, TCP across hosts. One I/O
/// thread per call moves the bytes; no user code runs on it. Tensors are on the CPU. Collective over the world. A
/// program may connect several times: at the same time under different names, one after the other with rising epochs.
/// Where ranks come from other hosts, one port serves one meeting at a time: connect in the same order on all ranks.
///
/// A process that is killed ends the operations of all others at once, with its rank as the origin; one that is stopped,
/// or cannot be reached, after ConnectOptions::liveness; one whose own code hangs at the timeout of an operation.
///
/// The ranks meet at rank 0 and beat from then on: a rank that is killed or stopped while they meet is named as well.
/// Each connection proves that it belongs to the job: on one host the kernel says that it is of the same user, and all
/// prove that they have World::secret, if there is one. SECURITY.md says what that protects.
///
/// @throws InvalidArgument  no master port although there are several ranks.
/// @throws CommError        the same on all ranks that have met: a rank did not come within the timeout (the text names
///                          the missing ones), has another WORLD_SIZE, has died or has failed; or the system has no
///                          more descriptors or threads.
std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options = {});

}  // namespace dualpipe
