#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/detail/comm/activity.hpp"
#include "dualpipe/detail/comm/message.hpp"
#include "dualpipe/detail/comm/step_end.hpp"
#include "dualpipe/detail/comm/stopwatch.hpp"

namespace dualpipe::detail {

/// Learns that something has arrived, ended or failed. Called from any thread, with no lock held.
class TransportListener {
 public:
  virtual ~TransportListener() = default;
  virtual void transport_changed() noexcept = 0;
};

/// Moves messages between all ranks of a run, as seen by one of them: matches messages with receives, waits, keeps
/// deadlines, and spreads failures. All communicators of a family share it on this rank, and so do their pending
/// operations. Its destruction tells the other ranks that this one has left.
///
/// A back end derives from it, implements start() and spread(), and calls complete(), deliver(), departed(), failed()
/// and abort(): from any thread, but never while it holds a lock that start() or spread() takes. Its destructor sends
/// what is still queued (for at most two seconds), then the goodbye.
class Transport {
 public:
  using Clock = Stopwatch::Clock;

  /// @param device  where the tensors are that travel.
  DUALPIPE_DECL Transport(int rank, int size, std::chrono::milliseconds timeout, std::int32_t epoch,
                          at::Device device = at::kCPU);
  virtual ~Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  std::int32_t epoch() const noexcept { return epoch_; }
  at::Device device() const noexcept { return device_; }

  /// Messages with one peer, group and channel match receives in the order of the calls.
  /// @throws CommError  the family has failed.
  DUALPIPE_DECL std::shared_ptr<Request> send(int to, Message message);
  DUALPIPE_DECL std::shared_ptr<Request> receive(int from, Header expected, bool any_signature,
                                                 std::string advice = {});

  /// Returns when all requests are done; `whole` names the operation that they are parts of.
  /// @throws CommError  and aborts: the family has failed, a peer has left, or the deadline has passed.
  DUALPIPE_DECL void wait(std::span<const std::shared_ptr<Request>> requests, const Request& whole);
  /// Whether wait() would return or throw at once.
  DUALPIPE_DECL bool done(std::span<const std::shared_ptr<Request>> requests) const;
  /// Whether all requests are done and the family has not failed.
  DUALPIPE_DECL bool succeeded(std::span<const std::shared_ptr<Request>> requests) const;

  /// The end of a step: Communicator::commit() of the ranks `members` of `group`.
  DUALPIPE_DECL std::vector<std::string> commit(std::int64_t group, const std::vector<int>& members,
                                                std::string ballot);

  /// The first failure wins: all waiting and later calls throw, here and on every other rank. Any thread.
  DUALPIPE_DECL void abort(int origin, const std::string& reason) noexcept;
  /// Aborts because of `request` and throws; `problem` completes "rank 3: receive from rank 2 (message 17 of group 0):
  /// …".
  [[noreturn]] DUALPIPE_DECL void raise(int origin, const Request& request, const std::string& problem);

  /// A back end says no goodbye after a failure: it could overtake the reason on the way to slower ranks.
  DUALPIPE_DECL bool has_failed() const;

  /// `listener` learns of every change from now on, as long as it lives.
  DUALPIPE_DECL void listen(std::weak_ptr<TransportListener> listener);

  /// As Communicator::shared_values().
  virtual SharedValues* shared_values() noexcept { return nullptr; }

  /// The next free group id. Two ranks never use one id for two groups that both belong to. Used by the rank's thread
  /// only.
  std::int64_t next_group() const noexcept { return next_group_; }
  void set_next_group(std::int64_t id) noexcept { next_group_ = id; }

 protected:
  /// Moves the message towards `to`, and must not block for the peer. Calls complete(request) when the receiver has
  /// taken over the tensors, or after their release() once nothing reads them any more. May drop the message silently
  /// after a failure or a departure.
  virtual void start(int to, Message message, std::shared_ptr<Request> request) = 0;
  /// Tells every rank that can be reached of the failure; these call failed(). Called at most once.
  virtual void spread(int origin, const std::string& reason) noexcept = 0;
  /// Votes for the next step of a group. @return the step, counted from 1
  virtual std::uint64_t vote(std::int64_t group, const std::vector<int>& members, std::string ballot) = 0;
  /// Returns when the step is no longer open, when a rank that has not voted has left, or at `limit` on `watch`. After
  /// a failure it is open no longer.
  virtual StepEnd wait_for_step(std::int64_t group, const std::vector<int>& members, std::uint64_t step,
                                Stopwatch& watch, Clock::duration limit) = 0;
  /// Ranks whose votes for the step have not come.
  virtual std::vector<int> missing_votes(std::int64_t group, const std::vector<int>& members,
                                         std::uint64_t step) const = 0;
  /// What another rank does; nothing if it does not answer within a second.
  virtual std::optional<RankActivity> ask(int rank) = 0;
  /// Called when the rank starts or stops blocking, with the mutex held. A back end that stops reading while nobody
  /// takes what has arrived must read on meanwhile: the wanted message may come later.
  virtual void waiting(bool /*begins*/) const {}

  /// A send is over.
  DUALPIPE_DECL void complete(const std::shared_ptr<Request>& request);
  /// A message has arrived with its tensors.
  DUALPIPE_DECL void deliver(int from, Message message);
  /// `peer` has said goodbye, and everything it had sent was delivered: operations that still need it fail.
  ///
  /// @param unwound  as is_unwound() was there.
  DUALPIPE_DECL void departed(int peer, bool unwound);
  /// For a destructor: whether an exception is the reason. The others hear of it in their errors.
  static bool is_unwound() noexcept { return std::uncaught_exceptions() > 0; }
  /// Another rank has aborted: as abort(), without spread().
  DUALPIPE_DECL void failed(int origin, const std::string& reason) noexcept;
  /// This process was stopped for about this `time`, which does not count in what activity() tells.
  DUALPIPE_DECL void was_stopped(Clock::duration time);

  /// What this rank does. Any thread.
  DUALPIPE_DECL RankActivity activity() const;

 private:
  /// When a wait warns.
  Clock::duration half_time() const { return timeout_ / 2; }
  DUALPIPE_DECL void warn_of_wait(const Request& request, const std::vector<int>& missing) const;

  /// As in MPI: messages without a receive, or receives without a message.
  struct MatchQueue {
    std::deque<Message> arrived;
    std::deque<std::shared_ptr<Request>> posted;
  };
  struct Failure {
    int origin = -1;
    std::string reason;
  };
  /// What the rank waits for: requests, or the votes of a step.
  struct Wait {
    std::string operation;
    Requests requests = {};
    std::int64_t group = 0;
    std::vector<int> members = {};  ///< of the step; empty: it waits for requests
    std::uint64_t step = 0;
  };
  using QueueKey = std::tuple<int, std::int64_t, Channel>;  // peer, group, channel

  DUALPIPE_DECL bool fail(int origin, const std::string& reason) noexcept;
  /// Wakes the waiting; without the mutex.
  DUALPIPE_DECL void notify() noexcept;
  /// Gives `receive` its message; `lock` holds the mutex.
  DUALPIPE_DECL void match(std::unique_lock<std::mutex> lock, Request& receive, Message message);
  /// Empty if there is none.
  DUALPIPE_DECL static std::string disagreement(const Request& receive, const Header& got);
  DUALPIPE_DECL void throw_if_failed(const Request& request) const;
  /// After a failure; `more` is said behind its reason.
  [[noreturn]] DUALPIPE_DECL void throw_failure(const Request& request,
                                                const std::string& more = {}) const;  // mutex held
  /// "rank 3: barrier (collective 4 of group 0): …"
  DUALPIPE_DECL std::string report(const Request& request, const std::string& problem) const;
  DUALPIPE_DECL std::vector<int> missing_of(std::span<const std::shared_ptr<Request>> requests) const;  // mutex held
  /// The error of a rank that waits no longer.
  DUALPIPE_DECL CommError overdue(const Request& request, const std::vector<int>& missing);
  DUALPIPE_DECL CommError has_left(const Request& request, int peer) const;  // mutex held
  /// Notes what the rank waits in, until end_wait().
  DUALPIPE_DECL void begin_wait(Wait wait);               // mutex held
  DUALPIPE_DECL void end_wait();                          // mutex held
  DUALPIPE_DECL bool lost(const Request& request) const;  // mutex held

  const int rank_;
  const int size_;
  const std::chrono::milliseconds timeout_;
  const std::int32_t epoch_;
  const at::Device device_;
  std::int64_t next_group_ = 1;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<QueueKey, MatchQueue> queues_;
  std::vector<bool> departed_;
  std::vector<bool> unwound_;  ///< of those that have departed
  std::optional<Failure> failure_;
  std::optional<Wait> wait_;
  std::string last_wait_;
  Clock::time_point wait_changed_ = Clock::now();
  std::weak_ptr<TransportListener> listener_;
  std::atomic<bool> has_listener_{false};
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/comm/transport.ipp"
#endif
