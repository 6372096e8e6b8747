#pragma once

#include <string>
#include <vector>

#include "dualpipe/launch/world.hpp"

namespace dualpipe::detail {

/// Which kernel and which network: between processes that agree on it, abstract Unix domain sockets reach.
std::string host_identity();

/// Addresses at which other hosts may reach this one: the one that leads to the master first, those of the loopback
/// interface, which only a test on one host can use, last. The name of a host often stands for 127.0.1.1 on itself.
std::vector<std::string> own_addresses(const World& world);

}  // namespace dualpipe::detail
