#pragma once

#include <asio/generic/stream_protocol.hpp>
#include <asio/io_context.hpp>
#include <cstdint>
#include <memory>
#include <vector>

#include "socket/rendezvous.hpp"

namespace dualpipe::detail {

enum class Route {
  best,  ///< Unix domain sockets between ranks of one host, TCP elsewhere
  tcp    ///< TCP everywhere
};

/// A connection whose two ends have identified each other.
struct Connection {
  int peer = 0;
  asio::generic::stream_protocol::socket socket;
  std::int64_t clock_offset_ns = 0;  ///< added to the peer's clock it gives this rank's; zero on one host
};

/// Connects this rank to all others. Returns when every rank has all its connections; nobody needs the store any more.
/// @param io  runs the sockets afterwards.
/// @throws CommError  a rank did not answer in time; the text names it.
std::vector<Connection> connect_all(asio::io_context& io, const World& world, Rendezvous& rendezvous, int epoch,
                                    Rendezvous::Clock::time_point deadline, Route route);

/// connect_sockets() with a choice of route: tests on one host use TCP too.
std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options, Route route);

}  // namespace dualpipe::detail
