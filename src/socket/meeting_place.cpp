#include "socket/meeting_place.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <asio/ip/tcp.hpp>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <utility>

#include "contact/host.hpp"
#include "dualpipe/detail/error_text.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;
using asio::ip::tcp;

/// How long rank 0 waits for its own addresses.
constexpr auto name_limit = 5s;
constexpr std::size_t longest_unix_name = 100;  // of the 107 bytes that Linux allows

/// What looks up the addresses of a host.
auto resolving(const std::string& name, int port) {
  return [name, port] { return resolve(name, port); };
}

/// Repeats `action` while its address is taken. @return any other error
template <class Action>
asio::error_code until_free(const std::string& place, const MeetingPlace::Wait& wait, const Action& action) {
  asio::error_code problem;
  wait(place, [&] {
    try {
      action();
      problem = {};
    } catch (const asio::system_error& error) {
      problem = error.code();
    }
    return problem != asio::error::address_in_use;
  });
  return problem;
}

}  // namespace

MeetingPlace::MeetingPlace(const World& world, const ConnectOptions& options, Stopwatch& watch, Route route)
    : world_(world),
      options_(options),
      watch_(watch),
      route_(route),
      uses_store_(options.store || world.launcher_hosts_store),
      store_(options.store) {
  if (route == Route::tcp) return;
  // The others have to find it: by the same computation, or in the store.
  unix_name_ = uses_store_ ? random_unix_name() : meeting_name(world, options.name, options.epoch);
}

CommError MeetingPlace::failure(const std::string& what) const {
  return {0, "rendezvous", str("rank ", world_.rank, ": ", what)};
}

/// Whether all ranks are on this host for certain.
bool MeetingPlace::is_local() const {
  return route_ == Route::best && is_loopback(world_.master_address) &&
         (!uses_store_ || world_.local_size == world_.size);
}

/// Nobody is called in vain: somebody silent there would keep this rank from looking at the Unix domain socket.
Place MeetingPlace::place_at(const std::string& name, const tcp::endpoint& endpoint) const {
  if (route_ == Route::best && !may_use_tcp(world_, endpoint.address())) return {name, std::nullopt, not_by_tcp};
  return {name, endpoint, ""};
}

/// The master's own addresses, but for loopback addresses, which a host's own name often is there.
std::vector<tcp::endpoint> MeetingPlace::listening_endpoints() {
  std::vector<tcp::endpoint> endpoints;
  try {
    const auto found = result_within(watch_, std::min<Stopwatch::Clock::duration>(name_limit, options_.timeout),
                                     resolving(world_.master_address, listening_port()));
    if (!found) return {};
    for (const tcp::endpoint& endpoint : *found) {
      const bool known = std::find(endpoints.begin(), endpoints.end(), endpoint) != endpoints.end();
      if (!known && (!endpoint.address().is_loopback() || route_ == Route::tcp)) endpoints.push_back(endpoint);
    }
  } catch (const std::exception&) {
    // This host need not know the name by which others know it.
  }
  return endpoints;
}

std::vector<tcp::endpoint> MeetingPlace::listen(const std::vector<tcp::endpoint>& endpoints, Listener& listener,
                                                const Wait& wait) const {
  std::vector<tcp::endpoint> bound;
  std::string problems;
  const auto try_at = [&](tcp::endpoint endpoint) {
    if (!bound.empty()) endpoint.port(bound.front().port());
    const auto problem = until_free(str(endpoint), wait, [&] { endpoint.port(listener.listen_at(endpoint)); });
    if (!problem)
      bound.push_back(endpoint);
    else  // not an address of this host, no IPv6 here
      problems += str(problems.empty() ? "" : ", ", endpoint, " (", problem.message(), ")");
  };
  for (const tcp::endpoint& endpoint : endpoints) try_at(endpoint);
  // All addresses of this host.
  if (bound.empty()) try_at({tcp::v6(), listening_port()});
  if (bound.empty()) try_at({tcp::v4(), listening_port()});
  if (bound.empty())
    throw failure(str("cannot listen at ", problems,
                      "; MASTER_ADDR must name the host of rank 0 and MASTER_PORT a port that it may use"));
  return bound;
}

void MeetingPlace::open(Listener& listener, const Wait& wait) {
  // Names are looked up first: a rank that has let in others beats.
  const std::vector<tcp::endpoint> wanted = is_local() ? std::vector<tcp::endpoint>() : listening_endpoints();
  if (!unix_name_.empty()) {
    const auto problem = until_free("its Unix domain socket", wait, [&] { listener.listen_here(unix_name_); });
    if (problem) throw asio::system_error(problem, "cannot listen at its Unix domain socket");
  }
  nlohmann::json place = {{"unix", unix_name_}, {"addresses", nlohmann::json::array()}, {"port", 0}};
  if (!is_local()) {
    if (world_.secret.empty() && route_ == Route::best) {
      TORCH_WARN_ONCE(
          "the job has no secret, so whoever reaches its ports can take part: the network must be trusted. "
          "DUALPIPE_SECRET_FILE names a file with a secret, the same on all hosts");
    }
    const std::vector<tcp::endpoint> endpoints = listen(wanted, listener, wait);
    place["port"] = endpoints.front().port();
    for (const tcp::endpoint& endpoint : endpoints)
      if (!endpoint.address().is_unspecified()) place["addresses"].push_back(endpoint.address().to_string());
  }
  if (!uses_store_) return;
  const bool tell_all = !is_local() && place["addresses"].empty();
  try {
    const auto set = [store = store_, open = opening(), key = store_key(), place, tell_all, world = world_]() mutable {
      if (tell_all) place["addresses"] = own_addresses(world);
      (store ? store : open())->set(key, place.dump());
      return true;
    };
    if (!result_within(watch_, options_.timeout, set)) throw std::runtime_error("it does not answer");
  } catch (const std::exception& error) {
    throw failure(str("the store failed: ", message_of(error)));
  }
}

std::string MeetingPlace::store_key() const {
  return str("dualpipe/", world_.run_id, "/", options_.name, "/", options_.epoch, "/rank 0");
}

std::function<MeetingPlace::StorePtr()> MeetingPlace::opening() const {
  c10d::TCPStoreOptions settings;
  settings.port = static_cast<std::uint16_t>(world_.master_port);
  settings.waitWorkers = false;
  settings.timeout = options_.timeout;
  return [address = world_.master_address, settings]() -> StorePtr {
    return c10::make_intrusive<c10d::TCPStore>(address, settings);
  };
}

std::vector<Place> MeetingPlace::places_in_store() {
  if (!store_) store_ = opened_.look(opening()).value_or(nullptr);
  if (!store_)
    throw std::runtime_error(
        str("the launcher's store at ", world_.master_address, ":", world_.master_port, " does not answer"));
  const auto text = in_store_.look([store = store_, key = store_key()]() -> std::string {
    return store->check({key}) ? store->get_to_str(key) : "";
  });
  if (!text) throw std::runtime_error("it does not answer");
  if (text->empty()) throw std::runtime_error("rank 0 has not written into it");
  const nlohmann::json place = nlohmann::json::parse(*text);
  std::vector<Place> places;
  const std::string unix_name = place.at("unix");
  if (unix_name.size() > longest_unix_name) throw std::runtime_error("it holds no place to meet at");
  if (!unix_name.empty() && route_ == Route::best)
    places.push_back({"its Unix domain socket", unix_endpoint(unix_name), ""});
  // Whoever writes into the store could name another user's process of this host, where all ranks are.
  const bool by_unix_only = is_local() && world_.secret.empty();
  const std::int64_t port = place.at("port");
  for (const std::string address : place.at("addresses")) {
    if (port < 1 || port > 65535) throw std::runtime_error("it holds no place to meet at");
    const tcp::endpoint endpoint(asio::ip::make_address(address), static_cast<std::uint16_t>(port));
    if (!by_unix_only) places.push_back(place_at(str(endpoint), endpoint));
  }
  if (places.empty()) throw std::runtime_error("it holds no place to meet at");
  return places;
}

std::vector<Place> MeetingPlace::places() {
  if (uses_store_) {
    try {
      return places_in_store();
    } catch (const std::exception& error) {
      return {{"the store", std::nullopt, message_of(error)}};
    }
  }
  std::vector<Place> places;
  const std::string name = str(world_.master_address, ":", world_.master_port);
  if (!unix_name_.empty()) places.push_back({"the Unix domain socket for " + name, unix_endpoint(unix_name_), ""});
  if (is_local()) return places;
  try {
    const auto found = endpoints_.look(resolving(world_.master_address, world_.master_port));
    if (!found) throw std::runtime_error("nobody tells its address");
    for (const tcp::endpoint& endpoint : *found) places.push_back(place_at(name, endpoint));
  } catch (const std::exception& error) {
    const auto* system = dynamic_cast<const asio::system_error*>(&error);
    places.push_back({name, std::nullopt, system != nullptr ? system->code().message() : error.what()});
  }
  return places;
}

}  // namespace dualpipe::detail
