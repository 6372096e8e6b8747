#pragma once

#include <asio/buffer.hpp>
#include <asio/generic/stream_protocol.hpp>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/detail/comm/message.hpp"
#include "socket/connect.hpp"
#include "socket/wire.hpp"

namespace dualpipe::detail {

class Peer;

/// Learns what a peer does. Called on the I/O thread, except for sent().
class PeerOwner {
 public:
  virtual void arrived(Peer& peer, Message message) = 0;
  virtual void voted(Peer& peer, Vote vote) = 0;
  virtual void told_of_failure(Peer& peer, wire::Failure failure) = 0;
  virtual void asked(Peer& peer) = 0;
  virtual void answered(Peer& peer, RankActivity activity) = 0;
  virtual void said_goodbye(Peer& peer, const wire::Goodbye& goodbye) = 0;
  /// Nothing more comes from the peer; `why` completes "rank 2 …".
  ///
  /// @param suspected  false: its process has closed the connection without a goodbye; true: it may live.
  virtual void lost(Peer& peer, const std::string& why, bool suspected) = 0;
  /// This rank cannot receive any more; `why` completes "rank 1 …".
  virtual void failed_here(const std::string& why) = 0;
  /// All bytes of a message are written. On the thread that wrote the last of them.
  virtual void sent(const std::shared_ptr<Request>& request) = 0;
  /// Whether reading may pause while nobody takes what has arrived.
  virtual bool may_hold_back() const = 0;

 protected:
  ~PeerOwner() = default;
};

/// Another rank, and the connection to it. The I/O thread reads, straight into the memory of new tensors. Small
/// messages are written by the calling thread where nothing is queued, others by the I/O thread, from the memory of the
/// tensors.
class Peer : public std::enable_shared_from_this<Peer> {
 public:
  Peer(Connection connection, PeerOwner& owner);

  int rank() const { return rank_; }
  /// Call once.
  void start_reading();
  /// Any thread. Calls PeerOwner::sent() unless the connection breaks before.
  void send(const Message& message, std::shared_ptr<Request> request);
  void send(const Vote& vote);
  void say_goodbye(const wire::Goodbye& goodbye);
  /// Drops what is queued, but for a message already sent in part, and sends this.
  void tell(const wire::Failure& failure);
  /// Tells the peer that this rank lives, unless something is under way that does.
  void beat();
  void ask();
  void answer(const RankActivity& activity);
  /// Ends the connection.
  void shut() noexcept;
  /// Whether everything sent reaches the peer even if this process ends now.
  bool flushed() const;
  /// If reading has paused, reads at least one more message. Any thread.
  void resume();

  /// Since when nothing has come from the peer, though this rank has listened. The I/O thread.
  std::chrono::steady_clock::time_point last_heard() const { return last_heard_; }
  /// Counts from now. The I/O thread.
  void listen_anew() { last_heard_ = std::chrono::steady_clock::now(); }
  /// Whether something may still come.
  bool is_over() const { return over_; }
  bool is_paused() const { return paused_; }

 private:
  struct Outgoing {
    std::string head;
    std::uint64_t payload = 0;                     ///< bytes of `tensors`
    std::shared_ptr<MessageTensors> tensors = {};  ///< may be null
    std::shared_ptr<Request> request = {};         ///< may be null
    std::uint64_t sent = 0;                        ///< bytes of head and payload together
  };

  /// @param urgent  before what is queued, but for a message already sent in part.
  void enqueue(Outgoing outgoing, bool urgent = false);
  void write(Requests& finished);  // mutex held
  void continue_writing();
  void report(const Requests& finished);

  void read_more();
  void parse();
  /// Takes one frame's prefix and head, and the buffered part of its payload, from the buffer. @return false if head or
  /// prefix are incomplete.
  bool parse_frame();
  void finish_message();
  /// @return whether reading pauses.
  bool hold_back();
  void ended(const asio::error_code& error);
  template <class Action>
  void guarded(const Action& action) noexcept;
  void taken(std::int64_t bytes);

  const int rank_;
  PeerOwner& owner_;
  asio::generic::stream_protocol::socket socket_;
  const int handle_;  ///< of socket_, whose own functions only one thread may call
  const bool local_;  ///< a Unix domain socket
  const std::int64_t clock_offset_ns_;
  const Broken broken_on_the_way_;

  mutable std::mutex mutex_;  // guards these three
  std::deque<Outgoing> queue_;
  bool writer_scheduled_ = false;
  bool broken_ = false;

  // Used by the I/O thread only.
  std::vector<char> buffer_;
  std::size_t begin_ = 0, end_ = 0;  ///< of the unparsed bytes in the buffer
  Message incoming_;
  std::vector<asio::mutable_buffer> missing_;  ///< memory of the incoming message that is not filled yet
  std::uint64_t incoming_bytes_ = 0;
  std::chrono::steady_clock::time_point last_heard_ = std::chrono::steady_clock::now();

  std::atomic<bool> over_{false};      ///< nothing more is read: the peer has left, is lost, or sent malformed bytes
  std::atomic<std::int64_t> held_{0};  ///< bytes that have arrived but no receive has matched
  std::atomic<bool> paused_{false};
};

}  // namespace dualpipe::detail
