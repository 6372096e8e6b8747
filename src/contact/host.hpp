#pragma once

#include <asio/ip/address.hpp>
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

}  // namespace dualpipe::detail
