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
#include "dualpipe/detail/comm/parcel.hpp"

// Back ends without device streams differ only in how a message travels. A Fabric moves messages between the ranks of
// the world; a MeshCommunicator makes sends, receives, collectives and groups of them, once for all fabrics. Ranks are
// world ranks here, except in the Communicator interface of a group.
namespace dualpipe::detail {

/// std::chrono::steady_clock, whose zero all processes of one host share.
std::int64_t now_ns() noexcept;

/// Collectives and transfers of one group do not match each other: they travel in separate lanes.
enum class Channel : std::uint8_t { transfer, collective };

/// What both ends of a message must agree on, and when it was sent. Travels before the tensors.
struct Header {
  std::int64_t group = 0;
  Channel channel = Channel::transfer;
  std::int32_t epoch = 0;
  std::uint64_t sequence =
      0;  ///< transfer: the k-th between these two ranks in this direction; collective: the k-th of the group
  std::int64_t issued_ns = 0;  ///< when the sender came to it
  std::string operation;       ///< "send", "all_reduce(sum)", "broadcast from rank 2"
  Signature signature;
  bool tensors_follow = true;  ///< false: they travel by another way, the message only announces them
};

/// Learns that something has arrived, ended or failed. Called from any thread, with no lock held.
class FabricListener {
 public:
  virtual ~FabricListener() = default;
  virtual void fabric_changed() noexcept = 0;
};

struct Message {
  Header header;
  std::shared_ptr<Parcel> parcel;  ///< never null; a message without tensors has an empty one
  /// Optional; run once when a receive has met the message, on the thread that found out, without locks held.
  std::function<void()> accepted;
};

/// One end of a message under way. Made by Fabric and guarded by its mutex until `done`, constant afterwards.
struct Transfer {
  enum class Kind : std::uint8_t { send, receive };
  Kind kind = Kind::send;
  int peer = 0;
  Header header;               ///< send: what was sent; receive: what is expected, and when it was posted
  bool any_signature = false;  ///< receive: header.signature is not compared
  std::string advice;          ///< receive: for the error where another signature comes
  Message message;             ///< send: its parcel; receive: what came
  bool done = false;
  std::int64_t completed_ns = 0;

  /// "receive from rank 2", "all_reduce(sum)"
  std::string operation() const;
  /// "receive from rank 2 (message 17 of group 0)"
  std::string describe() const;
  Transfer without_message() const;
  /// Stands for a collective, to name it.
  static Transfer collective(const Header& header);
};

/// The world of ranks as one of them sees it: matching of messages, waiting, deadlines, and failure. Shared by all
/// communicators of a family on this rank and by their pending operations; its destruction is this rank's goodbye.
///
/// A back end derives from it, implements start() and spread(), and reports what happens by complete(), deliver(),
/// departed(), failed() and abort(), from any thread and never with a lock of its own held that start() or spread()
/// take. Its destructor sends what is still queued (for at most two seconds), then the goodbye.
class Fabric {
 public:
  /// @param device  where the tensors are that travel.
  Fabric(int rank, int size, std::chrono::milliseconds timeout, std::int32_t epoch, at::Device device = at::kCPU);
  virtual ~Fabric() = default;
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  std::int32_t epoch() const noexcept { return epoch_; }
  at::Device device() const noexcept { return device_; }

  /// Messages of one lane (peer, group, channel) arrive in the order of the sends and meet its receives in their order.
  /// @throws CommError  the family has failed.
  std::shared_ptr<Transfer> send(int to, Message message);
  std::shared_ptr<Transfer> receive(int from, Header expected, bool any_signature, std::string advice = {});

  /// Returns when all are done; `whole` names the operation that they are parts of.
  /// @throws CommError  and aborts: the family has failed, a peer has left, or the deadline has passed.
  void wait(std::span<const std::shared_ptr<Transfer>> transfers, const Transfer& whole);
  /// Whether wait() would return or throw at once.
  bool done(std::span<const std::shared_ptr<Transfer>> transfers) const;
  /// Whether all are over, and the family has not failed.
  bool succeeded(std::span<const std::shared_ptr<Transfer>> transfers) const;

  /// The first failure wins: all waiting and later calls throw, here and on every other rank. Any thread.
  void abort(int origin, const std::string& reason) noexcept;
  /// Aborts because of `transfer` and throws; `problem` completes "rank 3: receive from rank 2 (message 17 of group 0):
  /// …".
  [[noreturn]] void raise(int origin, const Transfer& transfer, const std::string& problem);

  /// A back end that is destroyed afterwards says no goodbye: to slower ranks it would come ahead of the reason.
  bool has_failed() const;

  /// From now on `listener` learns of changes, for as long as it lives.
  void listen(std::weak_ptr<FabricListener> listener);

  /// Ids of groups: every group of two ranks has an id that these two have used for no other group. Used by the rank's
  /// thread only.
  std::int64_t next_group() const noexcept { return next_group_; }
  void set_next_group(std::int64_t id) noexcept { next_group_ = id; }

 protected:
  /// Moves the message towards `to`. Calls complete(transfer) when it no longer reads the parcel (having called
  /// release()), or when the receiver has it and both share the parcel. Must not block for the peer. After a failure or
  /// a departure it may drop the message silently.
  virtual void start(int to, Message message, std::shared_ptr<Transfer> transfer) = 0;
  /// Tells every other rank of the failure, as far as they can be reached; they call failed(). Called once at most.
  virtual void spread(int origin, const std::string& reason) noexcept = 0;
  /// The rank's thread begins or ends to want something that has not come. A back end that holds messages back while
  /// nobody takes those that came before must let them in meanwhile, as the wanted one may be behind. Called with the
  /// mutex held.
  virtual void waiting(bool /*begins*/) const {}

  /// A send is over.
  void complete(const std::shared_ptr<Transfer>& transfer);
  /// A message has arrived, its tensors included.
  void deliver(int from, Message message);
  /// An orderly goodbye, after everything that `peer` had sent was delivered: operations that still need the peer fail.
  void departed(int peer);
  /// Another rank aborted: as abort(), but is not spread again.
  void failed(int origin, const std::string& reason) noexcept;

 private:
  struct Lane {
    std::deque<Message> arrived;
    std::deque<std::shared_ptr<Transfer>> posted;
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
  void meet(std::unique_lock<std::mutex> lock, Transfer& receive, Message message);
  /// Empty if there is none.
  static std::string disagreement(const Transfer& receive, const Header& got);
  void throw_if_failed(const Transfer& transfer) const;
  [[noreturn]] void throw_failure(const Transfer& transfer) const;  // mutex held
  bool lost(const Transfer& transfer) const;                        // mutex held

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
  std::weak_ptr<FabricListener> listener_;
  std::atomic<bool> has_listener_{false};
};

/// A group of ranks of a fabric.
class MeshCommunicator final : public Communicator {
 public:
  /// `members[r]` is the world rank of rank r.
  /// @param device  of the tensors that travel: the fabric's, or the CPU.
  MeshCommunicator(std::shared_ptr<Fabric> fabric, std::int64_t group, std::vector<int> members, int rank,
                   at::Device device);
  /// All ranks of the world, group 0.
  static std::shared_ptr<MeshCommunicator> world(std::shared_ptr<Fabric> fabric);

  const std::shared_ptr<Fabric>& fabric() const noexcept { return fabric_; }
  std::int64_t group() const noexcept { return group_; }
  /// World ranks of this communicator's ranks.
  const std::vector<int>& members() const noexcept { return members_; }

  at::Device device() const override { return device_; }
  Communicator& control() override;
  void connect(const std::vector<Edge>& edges) override;
  Pending send(int peer, Tensors tensors) override;
  Pending receive(int peer, const std::optional<Expected>& expected) override;
  Pending all_reduce(Tensors tensors, Reduce reduce) override;
  Pending broadcast(Tensors tensors, int root) override;
  Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected) override;
  Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected) override;
  Pending barrier() override;
  Pending fence() override;
  std::shared_ptr<Communicator> split(int color, int key) override;
  void abort(const std::string& reason) noexcept override;

 private:
  Header header(Channel channel, std::string operation, std::uint64_t sequence, Signature signature) const;
  Header next_collective(std::string operation, Signature signature);
  std::vector<std::shared_ptr<Transfer>> receive_from_others(const Header& head);
  /// Nobody may write to `shared` any more.
  void send_to_others(const Header& head, const Tensors& shared);
  /// `outgoing[r]` to rank r and what rank r sends here at r of the result; all on `device`.
  Pending exchange(const char* operation, Tensors outgoing, at::Device device,
                   const std::optional<Signature>& expected = std::nullopt);
  Pending pending(const Header& head, std::vector<std::shared_ptr<Transfer>> transfers, Watch watched,
                  std::function<Tensors()> finish);

  std::shared_ptr<Fabric> fabric_;
  std::int64_t group_;
  std::vector<int> members_;
  at::Device device_;
  std::unique_ptr<MeshCommunicator> control_;  // of a device, once it is asked for
  std::vector<std::uint64_t> sends_;           // to each rank so far
  std::vector<std::uint64_t> receives_;        // from each rank so far
  std::uint64_t collectives_ = 0;
};

}  // namespace dualpipe::detail
