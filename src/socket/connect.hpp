#pragma once

#include <asio/generic/stream_protocol.hpp>
#include <asio/io_context.hpp>
#include <cstdint>
#include <memory>
#include <vector>

#include "contact/encryption.hpp"
#include "dualpipe/comm/socket.hpp"

namespace dualpipe::detail {

enum class Route {
  best,  ///< Unix domain sockets between ranks of one host, TCP elsewhere
  tcp    ///< TCP everywhere
};

/// A connection whose two ends have made sure of each other.
struct Connection {
  int peer = 0;
  asio::generic::stream_protocol::socket socket;
  std::int64_t clock_offset_ns = 0;  ///< added to the peer's clock it gives this rank's; zero on one host
  Broken broken = {};
};

/// Connects this rank to all others. Returns when every rank has all its connections.
/// @param io          runs the sockets afterwards.
/// @param encryption  of what crosses hosts; null: none.
/// @throws CommError  the same on all ranks that have met: one did not come or answer in time, has died, or has failed.
std::vector<Connection> connect_all(asio::io_context& io, const World& world, const ConnectOptions& options,
                                    Route route, Encryption* encryption);

/// connect_sockets() with a choice of route: tests on one host use TCP too.
std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options, Route route);

}  // namespace dualpipe::detail
