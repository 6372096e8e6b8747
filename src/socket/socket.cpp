#include "dualpipe/comm/socket.hpp"

#include <pthread.h>

#include <algorithm>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "contact/blocked_signals.hpp"
#include "contact/encryption.hpp"
#include "dualpipe/detail/comm/message_communicator.hpp"
#include "dualpipe/detail/comm/stopwatch.hpp"
#include "dualpipe/detail/error_text.hpp"
#include "socket/connect.hpp"
#include "socket/peer.hpp"
#include "socket/steps.hpp"

namespace dualpipe {
namespace detail {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

/// A destroyed communicator may take this long to send what is queued.
constexpr auto farewell_limit = 1500ms;

/// A rank that lives answers at once, whatever its user's thread does, unless its connection is busy.
constexpr auto answer_limit = 1s;
/// How long a rank waits for the others to agree about a step after a failure, where nobody looks for silent ranks.
constexpr auto patience_without_liveness = 30s;
constexpr auto least_liveness = 100ms;
constexpr std::chrono::milliseconds longest_time = std::chrono::hours(24 * 365);

/// The thread that runs `io`; stopped and joined by the destructor.
class IoThread {
 public:
  /// @param failed  called on the thread, with the reason, if `io` ends by an exception.
  IoThread(asio::io_context& io, std::function<void(const std::string&)> failed) : io_(io) {
    const BlockedSignals blocked;
    thread_ = std::thread([&io, failed = std::move(failed)] {
      pthread_setname_np(pthread_self(), "dualpipe-io");
      const auto work = asio::make_work_guard(io);
      try {
        io.run();
      } catch (const std::exception& error) {
        failed(str("the I/O thread ended: ", error.what()));
      }
    });
  }
  ~IoThread() {
    io_.stop();
    thread_.join();
  }
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;

 private:
  asio::io_context& io_;
  std::thread thread_;
};

/// Ranks that are processes, each connected to each other.
class SocketTransport final : public Transport, public PeerOwner {
 public:
  SocketTransport(const World& world, const ConnectOptions& options, Route route)
      : Transport(world.rank, world.size, options.timeout, options.epoch),
        liveness_(options.liveness),
        peers_(world.size),
        steps_(world.rank, peers_, liveness_ > 0ms ? 3 * liveness_ : patience_without_liveness) {
    if (world.size == 1) return;
    if (options.encryption) encryption_.emplace(world.secret);
    auto connections = connect_all(io_, world, options, route, encryption_ ? &*encryption_ : nullptr);
    const auto due = Clock::now();  // before peers count as heard: this process may be stopped until the thread runs
    for (Connection& connection : connections) {
      auto& peer = peers_[connection.peer];
      peer = std::make_shared<Peer>(std::move(connection), *this);
      peer->start_reading();
    }
    if (liveness_ > 0ms) asio::post(io_, [this, due] { watch(due); });
    try {
      thread_.emplace(io_, [this](const std::string& reason) {
        Transport::abort(this->rank(), str("rank ", this->rank(), ": ", reason));
      });
    } catch (const std::system_error& error) {
      const std::string message = str("rank ", world.rank, ": cannot start the I/O thread: ", error.what());
      spread(world.rank, message);  // the others are connected already
      throw CommError(world.rank, "connect", message);
    }
  }

  ~SocketTransport() override {
    if (!thread_) return;
    try {
      Stopwatch watch;
      leaving_ = true;
      waiting(true);  // reads and drops what peers still send, so that they can finish sending
      if (!has_failed()) steps_.say_goodbye(is_unwound());
      // The kernel has usually taken everything already.
      while (!flushed() && watch.elapsed() < farewell_limit) std::this_thread::sleep_for(1ms);
    } catch (...) {
      // Peers see the connection end without a goodbye.
    }
    thread_.reset();  // while everything that it calls still exists
  }

 private:
  void start(int to, Message message, std::shared_ptr<Request> request) override {
    peers_[to]->send(message, std::move(request));
  }

  void spread(int origin, const std::string& reason) noexcept override {
    steps_.failed(origin, reason);
    read_all();
  }

  std::uint64_t vote(std::int64_t group, const std::vector<int>& members, std::string ballot) override {
    return steps_.vote(group, members, std::move(ballot));
  }

  StepEnd wait_for_step(std::int64_t group, const std::vector<int>& /*members*/, std::uint64_t step, Stopwatch& watch,
                        Clock::duration limit) override {
    waiting(true);
    StepEnd end = steps_.wait(group, step, watch, limit);
    waiting(false);
    // The other operations may not have heard of it yet.
    if (const auto failure = steps_.failure()) failed(failure->first, failure->second);
    return end;
  }

  std::vector<int> missing_votes(std::int64_t group, const std::vector<int>& /*members*/,
                                 std::uint64_t step) const override {
    return steps_.missing(group, step);
  }

  std::optional<RankActivity> ask(int rank) override {
    Peer& peer = *peers_[rank];
    if (peer.is_over()) return std::nullopt;
    std::unique_lock lock(answers_mutex_);
    answers_.erase(rank);
    peer.ask();
    waiting(true);
    Stopwatch().wait(answers_changed_, lock, answer_limit, [&] { return answers_.contains(rank); });
    waiting(false);
    const auto answer = answers_.find(rank);
    return answer == answers_.end() ? std::nullopt : std::optional(answer->second);
  }

  void asked(Peer& peer) override { peer.answer(activity()); }

  void answered(Peer& peer, RankActivity activity) override {
    for (const int rank : activity.waits_for) require_rank(rank);
    const std::lock_guard lock(answers_mutex_);
    answers_[peer.rank()] = std::move(activity);
    answers_changed_.notify_all();
  }

  void waiting(bool begins) const override {
    if (!begins) {
      --waiting_;
      return;
    }
    ++waiting_;
    for_peers([](Peer& peer) { peer.resume(); });
  }

  void arrived(Peer& peer, Message message) override {
    if (!failed_ && !leaving_) deliver(peer.rank(), std::move(message));
  }

  void voted(Peer& peer, Vote vote) override {
    if (!steps_.vote_arrived(peer.rank(), std::move(vote)))
      throw wire::Malformed("a vote for a step that cannot have begun");
  }

  /// Passed on before this rank reacts: a rank that learned of the failure by the reaction would blame this rank.
  void told_of_failure(Peer& peer, wire::Failure failure) override {
    const int origin = failure.origin;
    const std::string reason = failure.reason;
    require_rank(origin);
    for (const int rank : failure.word.lost) require_rank(rank);
    steps_.failure_arrived(peer.rank(), std::move(failure));
    read_all();
    failed(origin, reason);
  }

  void said_goodbye(Peer& peer, const wire::Goodbye& goodbye) override {
    departed(peer.rank(), goodbye.unwound);  // first: who misses its vote says how it left
    steps_.goodbye_arrived(peer.rank(), goodbye.word);
  }

  void lost(Peer& peer, const std::string& why, bool suspected) override {
    const std::string reason = str("rank ", peer.rank(), " ", why);
    steps_.lost(peer.rank(), reason, suspected);
    read_all();
    failed(peer.rank(), reason);
  }

  void failed_here(const std::string& why) override { Transport::abort(rank(), str("rank ", rank(), " ", why)); }

  void sent(const std::shared_ptr<Request>& request) override {
    request->message.tensors->release();
    complete(request);
  }

  bool may_hold_back() const override { return waiting_ == 0 && !failed_; }

  /// After a failure nothing is held back: words of peers may come behind what nobody takes any more.
  void read_all() noexcept {
    if (failed_.exchange(true)) return;
    try {
      for_peers([](Peer& peer) { peer.resume(); });
    } catch (...) {
      // No memory: a peer that waits for this one finds it silent.
    }
  }

  void require_rank(int rank) const {
    if (rank < 0 || rank >= size()) throw wire::Malformed(str("there is no rank ", rank));
  }

  /// Beats, and looks who has not been heard for too long, every fifth of that time. On the I/O thread.
  ///
  /// @param due  when it should have been called.
  void watch(Clock::time_point due) {
    const auto now = Clock::now();
    const auto interval = liveness_ / 5;
    const bool stopped = now - due > interval;  // this process, which says nothing about the others
    if (stopped) was_stopped(now - due);
    for_peers([&](Peer& peer) {
      if (peer.is_over()) return;
      if (stopped || peer.is_paused()) peer.listen_anew();
      if (peer.is_paused()) peer.resume();  // a word may stand behind what nobody takes
      if (now - peer.last_heard() > liveness_) {
        if (silent_.insert(peer.rank()).second)
          lost(peer,
               str("has given no sign of life for ", liveness_.count(),
                   " ms (stopped, or its host or the network failed?)"),
               /*suspected=*/true);
      } else {
        peer.beat();
      }
    });
    pulse_.expires_at(now + interval);
    pulse_.async_wait([this, next = now + interval](const asio::error_code& error) {
      if (!error) watch(next);
    });
  }

  bool flushed() const {
    bool all = true;
    for_peers([&](const Peer& peer) { all = all && peer.flushed(); });
    return all && (!encryption_ || encryption_->flushed());  // it gets what peers have written
  }

  template <class Action>
  void for_peers(const Action& action) const {
    for (const auto& peer : peers_) {
      if (peer) action(*peer);
    }
  }

  const std::chrono::milliseconds liveness_;
  std::optional<Encryption> encryption_;  // serves the connections of peers
  asio::io_context io_{1};
  asio::steady_timer pulse_{io_};
  std::set<int> silent_;  // used by the I/O thread

  Steps::Peers peers_;
  Steps steps_;
  std::mutex answers_mutex_;  // guards these two
  std::condition_variable answers_changed_;
  std::map<int, RankActivity> answers_;

  std::atomic<bool> failed_{false};
  std::atomic<bool> leaving_{false};
  mutable std::atomic<int> waiting_{0};
  std::optional<IoThread> thread_;
};

}  // namespace

std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options, Route route) {
  DUALPIPE_CHECK(world.size >= 1 && world.rank >= 0 && world.rank < world.size, "there is no rank ", world.rank,
                 " in a world of ", world.size);
  DUALPIPE_CHECK(options.timeout.count() > 0, "the timeout of a communicator must be positive, got ",
                 options.timeout.count(), " ms");
  DUALPIPE_CHECK(options.liveness.count() == 0 || options.liveness >= detail::least_liveness,
                 "the liveness of a communicator must be 0 or at least ", detail::least_liveness.count(), " ms, got ",
                 options.liveness.count(), " ms");
  DUALPIPE_CHECK(world.size == 1 || options.store || (world.master_port > 0 && world.master_port <= 65535), "the ",
                 world.size, " ranks have no port to meet at (master_port is ", world.master_port,
                 "): set MASTER_ADDR and MASTER_PORT, or start the program with dualpipe-run or torchrun");
  DUALPIPE_CHECK(!options.encryption || !world.secret.empty(),
                 "encryption needs a secret, and this job has none: DUALPIPE_SECRET_FILE names a file with one");
  ConnectOptions within = options;  // the range of the clock
  within.timeout = std::min(options.timeout, longest_time);
  within.liveness = std::min(options.liveness, longest_time);
  try {
    return MessageCommunicator::world(std::make_shared<SocketTransport>(world, within, route));
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {  // no descriptors, no memory, …
    throw CommError(world.rank, "connect", str("rank ", world.rank, ": cannot connect: ", message_of(error)));
  }
}

}  // namespace detail

std::shared_ptr<Communicator> connect_sockets(const World& world, const ConnectOptions& options) {
  return detail::connect_sockets(world, options, detail::Route::best);
}

}  // namespace dualpipe
