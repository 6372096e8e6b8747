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

/// A connection to one peer, both sides of which know each other.
struct Connection {
  int peer = 0;
  asio::generic::stream_protocol::socket socket;
  std::int64_t clock_offset_ns = 0;  ///< what to add to the peer's clock to get this one's; zero on one host
};

/// Connects this rank to all others. Returns when every rank has all its connections, so that nobody needs the store
/// any more.
/// @param io  where the sockets shall work from then on.
/// @throws CommError  a rank did not answer in time; the text names it.
std::vector<Connection> connect_mesh(asio::io_context& io, const World& world, Rendezvous& rendezvous, int epoch,
                                     Rendezvous::Clock::time_point deadline, Route route);

/// connect_sockets() that lets tests on one host use what travels between hosts.
std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options, Route route);

}  // namespace dualpipe::detail
