#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/comm/message.hpp"

namespace dualpipe::detail {

/// Learns that something has arrived, ended or failed. Called from any thread, with no lock held.
class TransportListener {
 public:
  virtual ~TransportListener() = default;
  virtual void transport_changed() noexcept = 0;
};

/// The world of ranks as one of them sees it: matching of messages, waiting, deadlines, and failure. Shared by all
/// communicators of a family on this rank and by their pending operations; its destruction is this rank's goodbye.
///
/// A back end derives from it, implements start() and spread(), and reports what happens by complete(), deliver(),
/// departed(), failed() and abort(), from any thread and never with a lock of its own held that start() or spread()
/// take. Its destructor sends what is still queued (for at most two seconds), then the goodbye.
class Transport {
 public:
  /// @param device  where the tensors are that travel.
  Transport(int rank, int size, std::chrono::milliseconds timeout, std::int32_t epoch, at::Device device = at::kCPU);
  virtual ~Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  std::int32_t epoch() const noexcept { return epoch_; }
  at::Device device() const noexcept { return device_; }

  /// Messages of one lane (peer, group, channel) arrive in the order of the sends and meet its receives in their order.
  /// @throws CommError  the family has failed.
  std::shared_ptr<Request> send(int to, Message message);
  std::shared_ptr<Request> receive(int from, Header expected, bool any_signature, std::string advice = {});

  /// Returns when all are done; `whole` names the operation that they are parts of.
  /// @throws CommError  and aborts: the family has failed, a peer has left, or the deadline has passed.
  void wait(std::span<const std::shared_ptr<Request>> transfers, const Request& whole);
  /// Whether wait() would return or throw at once.
  bool done(std::span<const std::shared_ptr<Request>> transfers) const;
  /// Whether all are over, and the family has not failed.
  bool succeeded(std::span<const std::shared_ptr<Request>> transfers) const;

  /// The first failure wins: all waiting and later calls throw, here and on every other rank. Any thread.
  void abort(int origin, const std::string& reason) noexcept;
  /// Aborts because of `transfer` and throws; `problem` completes "rank 3: receive from rank 2 (message 17 of group 0):
  /// …".
  [[noreturn]] void raise(int origin, const Request& transfer, const std::string& problem);

  /// A back end that is destroyed afterwards says no goodbye: to slower ranks it would come ahead of the reason.
  bool has_failed() const;

  /// From now on `listener` learns of changes, for as long as it lives.
  void listen(std::weak_ptr<TransportListener> listener);

  /// Ids of groups: every group of two ranks has an id that these two have used for no other group. Used by the rank's
  /// thread only.
  std::int64_t next_group() const noexcept { return next_group_; }
  void set_next_group(std::int64_t id) noexcept { next_group_ = id; }

 protected:
  /// Moves the message towards `to`. Calls complete(transfer) when it no longer reads the parcel (having called
  /// release()), or when the receiver has it and both share the parcel. Must not block for the peer. After a failure or
  /// a departure it may drop the message silently.
  virtual void start(int to, Message message, std::shared_ptr<Request> transfer) = 0;
  /// Tells every other rank of the failure, as far as they can be reached; they call failed(). Called once at most.
  virtual void spread(int origin, const std::string& reason) noexcept = 0;
  /// The rank's thread begins or ends to want something that has not come. A back end that holds messages back while
  /// nobody takes those that came before must let them in meanwhile, as the wanted one may be behind. Called with the
  /// mutex held.
  virtual void waiting(bool /*begins*/) const {}

  /// A send is over.
  void complete(const std::shared_ptr<Request>& transfer);
  /// A message has arrived, its tensors included.
  void deliver(int from, Message message);
  /// An orderly goodbye, after everything that `peer` had sent was delivered: operations that still need the peer fail.
  void departed(int peer);
  /// Another rank aborted: as abort(), but is not spread again.
  void failed(int origin, const std::string& reason) noexcept;

 private:
  struct Lane {
    std::deque<Message> arrived;
    std::deque<std::shared_ptr<Request>> posted;
  };
  struct Failure {
    int origin = -1;
    std::string reason;
  };
  using LaneKey = std::tuple<int, std::int64_t, Channel>;

  bool fail(int origin, const std::string& reason) noexcept;
  /// Wakes those that wait; without the mutex.
  void notify() noexcept;
  /// Lets a receive and its message meet; `lock` holds the mutex.
  void meet(std::unique_lock<std::mutex> lock, Request& receive, Message message);
  /// Empty if there is none.
  static std::string disagreement(const Request& receive, const Header& got);
  void throw_if_failed(const Request& transfer) const;
  [[noreturn]] void throw_failure(const Request& transfer) const;  // mutex held
  bool lost(const Request& transfer) const;                        // mutex held

  const int rank_;
  const int size_;
  const std::chrono::milliseconds timeout_;
  const std::int32_t epoch_;
  const at::Device device_;
  std::int64_t next_group_ = 1;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<LaneKey, Lane> lanes_;
  std::vector<bool> departed_;
  std::optional<Failure> failure_;
  std::weak_ptr<TransportListener> listener_;
  std::atomic<bool> has_listener_{false};
};

}  // namespace dualpipe::detail
