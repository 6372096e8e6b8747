#include "socket/rendezvous.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <asio/connect.hpp>
#include <asio/ip/tcp.hpp>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "dualpipe/detail/error_text.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;
constexpr auto first_poll_pause = 1ms;
constexpr auto last_poll_pause = 50ms;
/// Longest time of one try to reach the store.
constexpr auto try_limit = 5s;
/// After this time a warning says why nothing happens.
constexpr std::chrono::milliseconds silence_limit = 10s;

/// A rank that serves the store and gives up waits so long for the others to read why.
constexpr auto reading_limit = 2s;

const char* const entered_key = "entered";
const char* const left_key = "left";
const char* const failure_key = "failure";

std::chrono::milliseconds remaining(Rendezvous::Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Rendezvous::Clock::now());
  return std::max<std::chrono::milliseconds>(left, 1ms);
}

std::string store_key(const std::string& key, int rank) { return str(key, "/", rank); }

/// "1, 2, 5"
std::string list(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += str(text.empty() ? "" : ", ", rank);
  return text;
}

/// Serves until the process ends: ranks meet at the port again under other names and for later epochs, and a rank that
/// comes early must not find a server that is about to close.
void keep_serving(int port, c10::intrusive_ptr<c10d::Store> store) {
  static std::mutex mutex;
  static auto* const stores =
      new std::map<int, c10::intrusive_ptr<c10d::Store>>;  // never destroyed: c10d's own statics may go first
  const std::lock_guard lock(mutex);
  stores->emplace(port, std::move(store));
}

}  // namespace

template <class Action>
auto Rendezvous::with_store(const Action& action) const {
  try {
    return action(*store_);
  } catch (const std::exception& error) {
    throw CommError(0, "rendezvous", str("rank ", world_.rank, ": the store failed: ", message_of(error)));
  }
}

Rendezvous::Rendezvous(const World& world, const ConnectOptions& options, Clock::time_point deadline)
    : world_(world),
      options_(options),
      deadline_(deadline),
      warn_at_(Clock::now() + std::min(silence_limit, options.timeout / 4)),
      store_(c10::make_intrusive<c10d::PrefixStore>(
          str("dualpipe/", world.run_id, "/", options.name, "/", options.epoch), open())) {
  with_store([](c10d::Store& store) { store.add(entered_key, 1); });
}

Rendezvous::~Rendezvous() {
  try {
    store_->add(left_key, 1);
  } catch (...) {
    // The store has ended, so nobody waits for this rank.
  }
}

void Rendezvous::give_up(const CommError& error) noexcept {
  try {
    if (!store_->check({failure_key})) store_->set(failure_key, str(error.origin_rank(), " ", error.what()));
    if (!serves_) return;
    const auto limit = Clock::now() + reading_limit;
    while (store_->add(left_key, 0) < store_->add(entered_key, 0) - 1 && Clock::now() < limit)
      std::this_thread::sleep_for(last_poll_pause);
  } catch (...) {
    // The store has ended: others see that.
  }
}

void Rendezvous::throw_if_another_gave_up() {
  if (!with_store([](c10d::Store& store) { return store.check({failure_key}); })) return;
  const std::string text = with_store([](c10d::Store& store) { return store.get_to_str(failure_key); });
  throw CommError(std::atoi(text.c_str()), "rendezvous", text.substr(text.find(' ') + 1));
}

bool Rendezvous::is_time_to_warn() const { return !warned_ && Clock::now() >= warn_at_; }

void Rendezvous::warn_once(const std::string& what) {
  if (!is_time_to_warn()) return;
  warned_ = true;
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
      serves_ = settings.isServer;
      if (serves_) keep_serving(world_.master_port, store);
      return store;
    } catch (const std::exception& error) {
      problem = message_of(error);
    }
    std::this_thread::sleep_for(last_poll_pause);
  } while (!settings.isServer && Clock::now() < deadline_);
  throw CommError(
      0, "rendezvous",
      str("rank ", world_.rank, settings.isServer ? ": cannot serve the store at " : ": cannot use the store at ",
          place, ": ", problem, "; MASTER_ADDR must name the host of rank 0 and MASTER_PORT a free port there"));
}

/// Waits for the server without a TCPStore, which would try once a second and log each failure.
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
      io.run_for(std::min<std::chrono::milliseconds>(try_limit, remaining(deadline_)));
      if (!error) return;
    }
    problem = error.message();
    warn_once(str("rank 0 to serve the store at ", place, " (", problem, ")"));
    std::this_thread::sleep_for(std::min<std::chrono::milliseconds>(last_poll_pause, remaining(deadline_)));
  } while (Clock::now() < deadline_);
  throw CommError(0, "rendezvous",
                  str("rank ", world_.rank, ": rank 0 does not serve the store at ", place, " within ",
                      options_.timeout.count(), " ms (", problem,
                      "): it has not started or has ended, or MASTER_ADDR and MASTER_PORT (dualpipe-run: --rendezvous) "
                      "do not name its host and a port that this host reaches there"));
}

void Rendezvous::publish(const std::string& key, const std::string& value) {
  with_store([&](c10d::Store& store) { store.set(store_key(key, world_.rank), value); });
}

std::vector<int> Rendezvous::missing(const std::string& key, const std::vector<int>& ranks) {
  std::vector<int> result;
  for (const int rank : ranks)
    if (!with_store([&](c10d::Store& store) { return store.check({store_key(key, rank)}); })) result.push_back(rank);
  return result;
}

std::vector<std::string> Rendezvous::collect(const std::string& key, const std::vector<int>& ranks) {
  std::vector<std::string> keys;
  for (const int rank : ranks) keys.push_back(store_key(key, rank));
  // Not Store::wait(): it cannot say who is missing, and blocks all other users of the client.
  auto pause = std::chrono::milliseconds(first_poll_pause);
  while (!with_store([&](c10d::Store& store) { return store.check(keys); })) {
    throw_if_another_gave_up();
    const bool late = Clock::now() >= deadline_;
    if (late || is_time_to_warn()) {
      const std::vector<int> who = missing(key, ranks);
      if (who.empty()) break;
      const std::string place = str("communicator '", options_.name, "', epoch ", options_.epoch);
      if (late)
        throw CommError(
            who.front(), "rendezvous",
            str("rank ", world_.rank, ": no sign of rank ", list(who), " within ", options_.timeout.count(), " ms (",
                place, ", ", world_.size, " ranks): have all started, with the same WORLD_SIZE, name and epoch?"));
      warn_once(str("rank ", list(who), " to start (", place, ")"));
    }
    std::this_thread::sleep_for(pause);
    pause = std::min<std::chrono::milliseconds>(pause * 2, last_poll_pause);
  }
  std::vector<std::string> values;
  for (const std::string& name : keys)
    values.push_back(with_store([&](c10d::Store& store) { return store.get_to_str(name); }));
  return values;
}

}  // namespace dualpipe::detail
