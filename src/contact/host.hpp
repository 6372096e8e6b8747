#pragma once

#include <asio/ip/address.hpp>
#include <asio/ip/tcp.hpp>
#include <string>
#include <vector>

#include "dualpipe/launch/world.hpp"

namespace dualpipe::detail {

/// Identifies kernel and network namespace: processes with equal ones can use abstract Unix domain sockets.
std::string host_identity();

/// Addresses at which other hosts may reach this one. The address used towards the master comes first, loopback
/// addresses last: only tests on one host use them, but a host's own name often resolves to 127.0.1.1.
std::vector<std::string> own_addresses(const World& world);

/// Whether a process of this host may have that address.
bool is_of_this_host(const asio::ip::address& address);

bool is_loopback(const std::string& address);

/// The addresses of a host; blocks. @throws asio::system_error  the name is unknown.
std::vector<asio::ip::tcp::endpoint> resolve(const std::string& name, int port);

/// The name of the abstract Unix domain socket where rank 0 waits for those of its host to connect `communicator`.
std::string meeting_name(const World& world, const std::string& communicator, int epoch);

/// Whether one talks to a process at `address` by TCP. Without a secret only the kernel tells whose process it is, and
/// only at a Unix domain socket, which everybody on this host can use.
bool may_use_tcp(const World& world, const asio::ip::address& address);
/// What is said where it is false.
inline constexpr const char* not_by_tcp =
    "on this host, where only the Unix domain socket tells whose process answers; a rank 0 in a container behind a "
    "port of this host needs a secret: DUALPIPE_SECRET_FILE names a file with one";

}  // namespace dualpipe::detail
