#include "contact/host.hpp"

#include <ifaddrs.h>
#include <net/if.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/io_context.hpp>
#include <asio/ip/udp.hpp>
#include <cstring>
#include <memory>

#include "contact/secrets.hpp"
#include "dualpipe/detail/host.hpp"

namespace dualpipe::detail {
namespace {

/// Of all interfaces that are up, but for loopback.
std::vector<asio::ip::address> interface_addresses() {
  std::vector<asio::ip::address> result;
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return result;
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(list, ::freeifaddrs);
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0 || (entry->ifa_flags & IFF_LOOPBACK) != 0)
      continue;
    if (entry->ifa_addr->sa_family == AF_INET) {
      const auto* address = reinterpret_cast<const sockaddr_in*>(entry->ifa_addr);
      result.push_back(asio::ip::address_v4(ntohl(address->sin_addr.s_addr)));
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
      asio::ip::address_v6::bytes_type bytes;
      std::memcpy(bytes.data(), &reinterpret_cast<const sockaddr_in6*>(entry->ifa_addr)->sin6_addr, bytes.size());
      result.push_back(asio::ip::address_v6(bytes));
    }
  }
  return result;
}

/// This host's addresses on the routes to the master.
std::vector<asio::ip::address> addresses_towards(const World& world) {
  std::vector<asio::ip::address> result;
  asio::io_context io;
  asio::error_code error;
  for (const auto& entry :
       asio::ip::udp::resolver(io).resolve(world.master_address, std::to_string(world.master_port), error)) {
    asio::ip::udp::socket probe(io);
    if (probe.connect(entry.endpoint(), error)) continue;  // sends nothing
    const auto local = probe.local_endpoint(error);
    if (!error) result.push_back(local.address());
  }
  return result;
}

}  // namespace

std::string host_identity() {
  std::array<char, 64> network{};
  const ssize_t length = ::readlink("/proc/self/ns/net", network.data(), network.size());
  return boot_id() + " " + std::string(network.data(), static_cast<std::size_t>(std::max<ssize_t>(length, 0)));
}

std::vector<std::string> own_addresses(const World& world) {
  std::vector<asio::ip::address> all = addresses_towards(world);
  for (const asio::ip::address& address : interface_addresses())
    if (!address.is_v6() || !address.to_v6().is_link_local()) all.push_back(address);
  std::stable_partition(all.begin(), all.end(),
                        [](const asio::ip::address& address) { return !address.is_loopback(); });
  std::vector<std::string> result;
  for (const asio::ip::address& address : all) {
    const std::string text = address.to_string();
    if (std::find(result.begin(), result.end(), text) == result.end()) result.push_back(text);
  }
  return result;
}

bool is_of_this_host(const asio::ip::address& address) {
  if (address.is_loopback()) return true;
  const auto without_scope = [](const asio::ip::address& a) {
    return a.is_v6() ? asio::ip::address(asio::ip::address_v6(a.to_v6().to_bytes())) : a;
  };
  const std::vector<asio::ip::address> own = interface_addresses();
  return std::any_of(own.begin(), own.end(),
                     [&](const asio::ip::address& each) { return without_scope(each) == without_scope(address); });
}

bool is_loopback(const std::string& address) {
  asio::error_code error;
  const auto parsed = asio::ip::make_address(address, error);
  return address == "localhost" || (!error && parsed.is_loopback());
}

std::vector<asio::ip::tcp::endpoint> resolve(const std::string& name, int port) {
  asio::io_context io;
  std::vector<asio::ip::tcp::endpoint> endpoints;
  for (const auto& entry : asio::ip::tcp::resolver(io).resolve(name, std::to_string(port)))
    endpoints.push_back(entry.endpoint());
  return endpoints;
}

std::string meeting_name(const World& world, const std::string& communicator, int epoch) {
  return "dualpipe." + hexadecimal(authentication_code(
                           world.secret, {"place", world.master_address, std::to_string(world.master_port),
                                          world.run_id, communicator, std::to_string(epoch)}));
}

bool may_use_tcp(const World& world, const asio::ip::address& address) {
  return !world.secret.empty() || !is_of_this_host(address);
}

}  // namespace dualpipe::detail
