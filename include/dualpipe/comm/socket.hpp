#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <memory>
#include <string>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/launch/world.hpp"

namespace dualpipe {

struct ConnectOptions {
  std::string name = "dualpipe";  ///< tells communicators of one run apart; the same on all ranks
  int epoch = 0;                  ///< raise it to connect again after a failure
  std::chrono::milliseconds timeout = std::chrono::minutes(5);  ///< longest wait of one operation, the rendezvous included
  c10::intrusive_ptr<c10d::Store> store;  ///< none: a TCPStore at the world's master address, hosted by rank 0 unless the launcher hosts one
};

/// Connects the processes of `world` with each other: Unix domain sockets within a host, TCP across hosts. One I/O thread per process moves
/// the bytes; no user code runs on it.
///
/// @throws InvalidArgument  no master port although there are several ranks.
/// @throws CommError        a rank did not come within the timeout; the text names the missing ones.
std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options = {});

}  // namespace dualpipe
