#include "socket/rendezvous.hpp"

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
/// One try to reach the store.
constexpr auto kAttempt = 5s;
/// Somebody who watches the program wants to know by then why nothing happens.
constexpr std::chrono::milliseconds kSilence = 10s;

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

/// "1, 2, 5"
std::string list(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += str(text.empty() ? "" : ", ", rank);
  return text;
}

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
      tell_at_(Clock::now() + std::min(kSilence, options.timeout / 4)),
      store_(c10::make_intrusive<c10d::PrefixStore>(
          str("dualpipe/", world.run_id, "/", options.name, "/", options.epoch), open())) {}

bool Rendezvous::is_time_to_tell() const { return !told_ && Clock::now() >= tell_at_; }

void Rendezvous::tell_once(const std::string& what) {
  if (!is_time_to_tell()) return;
  told_ = true;
  const auto left = std::chrono::duration_cast<std::chrono::seconds>(remaining(deadline_));
  TORCH_WARN("rank ", world_.rank, " waits for ", what, ", and gives up in ", left.count(), " s");
}

c10::intrusive_ptr<c10d::Store> Rendezvous::open() {
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
void Rendezvous::await_server() {
  const std::string place = str(world_.master_address, ":", world_.master_port);
  std::string problem;
  do {
    asio::io_context io;
    asio::ip::tcp::socket socket(io);
    asio::ip::tcp::resolver resolver(io);
    asio::error_code error;
    const auto endpoints = resolver.resolve(world_.master_address, std::to_string(world_.master_port), error);
    if (!error) {
      error = asio::error::timed_out;
      asio::async_connect(socket, endpoints, [&](const asio::error_code& result, const auto&) { error = result; });
      io.run_for(std::min<std::chrono::milliseconds>(kAttempt, remaining(deadline_)));
      if (!error) return;
    }
    problem = error.message();
    tell_once(str("rank 0 to serve the store at ", place, " (", problem, ")"));
    std::this_thread::sleep_for(std::min<std::chrono::milliseconds>(kPollLast, remaining(deadline_)));
  } while (Clock::now() < deadline_);
  throw CommError(0, "rendezvous",
                  str("rank ", world_.rank, ": rank 0 does not serve the store at ", place, " within ",
                      options_.timeout.count(), " ms (", problem,
                      "): it has not started or has ended, or MASTER_ADDR and MASTER_PORT (dualpipe-run: --rendezvous) "
                      "do not name its host and a port that this host reaches there"));
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

std::vector<int> Rendezvous::missing(const std::string& key, const std::vector<int>& ranks) {
  std::vector<int> result;
  for (const int rank : ranks)
    if (!with_store([&](c10d::Store& store) { return store.check({name_of(key, rank)}); })) result.push_back(rank);
  return result;
}

std::vector<std::string> Rendezvous::collect(const std::string& key, const std::vector<int>& ranks) {
  std::vector<std::string> keys;
  for (const int rank : ranks) keys.push_back(name_of(key, rank));
  // Not Store::wait(), which cannot say who is missing and blocks everybody else who uses the client.
  auto pause = std::chrono::milliseconds(kPollFirst);
  while (!with_store([&](c10d::Store& store) { return store.check(keys); })) {
    const bool late = Clock::now() >= deadline_;
    if (late || is_time_to_tell()) {
      const std::vector<int> who = missing(key, ranks);
      if (who.empty()) break;
      const std::string place = str("communicator '", options_.name, "', epoch ", options_.epoch);
      if (late)
        throw CommError(
            who.front(), "rendezvous",
            str("rank ", world_.rank, ": no sign of rank ", list(who), " within ", options_.timeout.count(), " ms (",
                place, ", ", world_.size, " ranks): have all started, with the same WORLD_SIZE, name and epoch?"));
      tell_once(str("rank ", list(who), " to start (", place, ")"));
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
