#include "comm/socket_rendezvous.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <asio/connect.hpp>
#include <asio/ip/tcp.hpp>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;
constexpr auto kPollFirst = 1ms;
constexpr auto kPollLast = 50ms;

/// c10's errors carry a stack trace that helps nobody here.
std::string text_of(const std::exception& error) {
  const auto* known = dynamic_cast<const c10::Error*>(&error);
  return known ? known->what_without_backtrace() : error.what();
}

std::chrono::milliseconds remaining(Rendezvous::Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Rendezvous::Clock::now());
  return std::max<std::chrono::milliseconds>(left, 1ms);
}

std::string name_of(const std::string& key, int rank) { return str(key, "/", rank); }

/// Until the process ends, as a port belongs to the process and not to a communicator: ranks meet there again under
/// other names and for later epochs, and those who come early must not find a server that is about to close.
void keep_serving(int port, c10::intrusive_ptr<c10d::Store> store) {
  static std::mutex mutex;
  static auto* const stores =
      new std::map<int, c10::intrusive_ptr<c10d::Store>>;  // never destroyed: c10d's own statics may go first
  const std::lock_guard lock(mutex);
  stores->emplace(port, std::move(store));
}

}  // namespace

Rendezvous::Rendezvous(const World& world, const ConnectOptions& options, Clock::time_point deadline)
    : world_(world),
      options_(options),
      deadline_(deadline),
      store_(c10::make_intrusive<c10d::PrefixStore>(
          str("dualpipe/", world.run_id, "/", options.name, "/", options.epoch), open())) {}

c10::intrusive_ptr<c10d::Store> Rendezvous::open() const {
  if (options_.store) return options_.store;
  c10d::TCPStoreOptions settings;
  settings.port = static_cast<std::uint16_t>(world_.master_port);
  settings.isServer = world_.rank == 0 && !world_.launcher_hosts_store;
  settings.waitWorkers = false;
  settings.multiTenant = true;  // several communicators of one process meet at one port
  const std::string place = str(world_.master_address, ":", world_.master_port);
  std::string problem;
  do {
    if (!settings.isServer) await_server();
    settings.timeout = remaining(deadline_);
    try {
      auto store = c10::make_intrusive<c10d::TCPStore>(world_.master_address, settings);
      if (settings.isServer) keep_serving(world_.master_port, store);
      return store;
    } catch (const std::exception& error) {
      problem = text_of(error);
    }
    std::this_thread::sleep_for(kPollLast);
  } while (!settings.isServer && Clock::now() < deadline_);
  throw CommError(
      0, "rendezvous",
      str("rank ", world_.rank, settings.isServer ? ": cannot serve the store at " : ": cannot use the store at ",
          place, ": ", problem, "; MASTER_ADDR must name the host of rank 0 and MASTER_PORT a free port there"));
}

/// Looks by itself for a server that is not there yet: a TCPStore would look once a second and complain each time.
void Rendezvous::await_server() const {
  const std::string place = str(world_.master_address, ":", world_.master_port);
  std::string problem = "no answer";
  do {
    asio::io_context io;
    asio::ip::tcp::socket socket(io);
    asio::ip::tcp::resolver resolver(io);
    asio::error_code error;
    const auto endpoints = resolver.resolve(world_.master_address, std::to_string(world_.master_port), error);
    if (!error) {
      error = asio::error::timed_out;
      asio::async_connect(socket, endpoints, [&](const asio::error_code& result, const auto&) { error = result; });
      io.run_for(remaining(deadline_));
      if (!error) return;
    }
    problem = error.message();
    std::this_thread::sleep_for(std::min<std::chrono::milliseconds>(kPollLast, remaining(deadline_)));
  } while (Clock::now() < deadline_);
  throw CommError(0, "rendezvous",
                  str("rank ", world_.rank, ": rank 0 does not serve the store at ", place, " within ",
                      options_.timeout.count(), " ms (", problem,
                      "): it has not started or has ended, or MASTER_ADDR and MASTER_PORT differ between the ranks"));
}

template <class Action>
auto Rendezvous::with_store(const Action& action) const {
  try {
    return action(*store_);
  } catch (const std::exception& error) {
    throw CommError(0, "rendezvous", str("rank ", world_.rank, ": the store failed: ", text_of(error)));
  }
}

void Rendezvous::publish(const std::string& key, const std::string& value) {
  with_store([&](c10d::Store& store) { store.set(name_of(key, world_.rank), value); });
}

std::vector<std::string> Rendezvous::collect(const std::string& key, const std::vector<int>& ranks) {
  std::vector<std::string> keys;
  for (const int rank : ranks) keys.push_back(name_of(key, rank));
  // Not Store::wait(), which cannot say who is missing and blocks everybody else who uses the client.
  auto pause = std::chrono::milliseconds(kPollFirst);
  while (!with_store([&](c10d::Store& store) { return store.check(keys); })) {
    if (Clock::now() >= deadline_) {
      std::string missing;
      int first = -1;
      for (std::size_t i = 0; i < keys.size(); ++i) {
        if (with_store([&](c10d::Store& store) { return store.check({keys[i]}); })) continue;
        if (first < 0) first = ranks[i];
        missing += str(missing.empty() ? "" : ", ", ranks[i]);
      }
      if (missing.empty()) break;
      throw CommError(first, "rendezvous",
                      str("rank ", world_.rank, ": no sign of rank ", missing, " within ", options_.timeout.count(),
                          " ms (communicator '", options_.name, "', epoch ", options_.epoch, ", ", world_.size,
                          " ranks): have all started, with the same WORLD_SIZE, name and epoch?"));
    }
    std::this_thread::sleep_for(pause);
    pause = std::min<std::chrono::milliseconds>(pause * 2, kPollLast);
  }
  std::vector<std::string> values;
  for (const std::string& name : keys)
    values.push_back(with_store([&](c10d::Store& store) { return store.get_to_str(name); }));
  return values;
}

}  // namespace dualpipe::detail
