#include "dualpipe/comm/socket.hpp"

#include <pthread.h>

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <atomic>
#include <csignal>
#include <thread>
#include <utility>

#include "dualpipe/detail/comm/message_communicator.hpp"
#include "socket/connect.hpp"
#include "socket/link.hpp"

namespace dualpipe {
namespace detail {
namespace {

using namespace std::chrono_literals;

/// What is left to say when a communicator is destroyed may take this long.
constexpr auto kFarewell = 1500ms;

/// Ranks that are processes, each connected to each other.
class SocketTransport final : public Transport, public LinkOwner {
 public:
  SocketTransport(const World& world, const ConnectOptions& options, Rendezvous::Clock::time_point deadline,
                  Route route)
      : Transport(world.rank, world.size, options.timeout, options.epoch),
        links_(static_cast<std::size_t>(world.size)) {
    if (world.size == 1) return;
    Rendezvous rendezvous(world, options, deadline);
    for (Connection& connection : connect_mesh(io_, world, rendezvous, options.epoch, deadline, route)) {
      if (connection.peer == world.rank) continue;
      auto& link = links_[static_cast<std::size_t>(connection.peer)];
      link = std::make_shared<Link>(std::move(connection), *this);
      link->start_reading();
    }
    start_thread();
  }

  ~SocketTransport() override {
    if (!thread_.joinable()) return;
    try {
      const auto deadline = std::chrono::steady_clock::now() + kFarewell;
      leaving_ = true;
      waiting(true);  // reads on, so that peers get rid of what they still send, and drops it
      if (!has_failed()) for_links([](Link& link) { link.say_goodbye(); });
      // Usually the kernel has already taken all.
      while (!flushed() && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(1ms);
    } catch (...) {
      // Peers will see a connection that ends without a goodbye.
    }
    io_.stop();
    thread_.join();
  }

 private:
  void start(int to, Message message, std::shared_ptr<Request> transfer) override {
    links_[static_cast<std::size_t>(to)]->send(message, std::move(transfer));
  }

  void spread(int origin, const std::string& reason) noexcept override { tell_of_failure(origin, reason, nullptr); }

  void waiting(bool begins) const override {
    if (!begins) {
      --waiting_;
      return;
    }
    ++waiting_;
    for_links([](Link& link) { link.resume(); });
  }

  void arrived(Link& link, Message message) override {
    if (!failed_ && !leaving_) deliver(link.peer(), std::move(message));
  }

  /// Passed on before anybody here reacts to it: a rank that learns of the failure by our reaction would take us for
  /// the culprit.
  void aborted(Link& link, int origin, const std::string& reason) override {
    tell_of_failure(origin, reason, &link);
    failed(origin, reason);
  }

  void said_goodbye(Link& link) override { departed(link.peer()); }

  void lost(Link& link, const std::string& why) override {
    if (!failed_) Transport::abort(link.peer(), str("rank ", link.peer(), " ", why));
  }

  void failed_here(const std::string& why) override { Transport::abort(rank(), str("rank ", rank(), " ", why)); }

  void sent(const std::shared_ptr<Request>& transfer) override {
    transfer->message.parcel->release();
    complete(transfer);
  }

  bool may_hold_back() const override { return waiting_ == 0 && !failed_; }

  void tell_of_failure(int origin, const std::string& reason, const Link* source) noexcept {
    if (failed_.exchange(true)) return;
    for_links([&](Link& link) {
      try {
        if (&link != source) link.abort(origin, reason);
        link.resume();
      } catch (...) {
        // No memory: this peer will see the connection end.
      }
    });
  }

  bool flushed() const {
    bool all = true;
    for_links([&](const Link& link) { all = all && link.flushed(); });
    return all;
  }

  template <class Action>
  void for_links(const Action& action) const {
    for (const auto& link : links_) {
      if (link) action(*link);
    }
  }

  void start_thread() {
    // Signals are for the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] {
      pthread_setname_np(pthread_self(), "dualpipe-io");
      const auto work = asio::make_work_guard(io_);
      try {
        io_.run();
      } catch (const std::exception& error) {
        Transport::abort(rank(), str("rank ", rank(), ": the I/O thread ended: ", error.what()));
      }
    });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  asio::io_context io_{1};
  std::vector<std::shared_ptr<Link>> links_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> leaving_{false};
  mutable std::atomic<int> waiting_{0};
  std::thread thread_;
};

}  // namespace

std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options, Route route) {
  DUALPIPE_CHECK(world.size >= 1 && world.rank >= 0 && world.rank < world.size, "there is no rank ", world.rank,
                 " in a world of ", world.size);
  DUALPIPE_CHECK(options.timeout.count() > 0, "the timeout of a communicator must be positive, got ",
                 options.timeout.count(), " ms");
  DUALPIPE_CHECK(world.size == 1 || options.store || (world.master_port > 0 && world.master_port <= 65535), "the ",
                 world.size, " ranks have no port to meet at (master_port is ", world.master_port,
                 "): set MASTER_ADDR and MASTER_PORT, or start the program with dualpipe-run or torchrun");
  // Further away than this it would leave the range of the clock.
  const auto patience = std::min<std::chrono::milliseconds>(options.timeout, std::chrono::hours(24 * 365));
  const auto deadline = Rendezvous::Clock::now() + patience;
  return MessageCommunicator::world(std::make_shared<SocketTransport>(world, options, deadline, route));
}

}  // namespace detail

std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options) {
  return detail::connect_sockets(world, options, detail::Route::best);
}

}  // namespace dualpipe
