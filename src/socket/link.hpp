#pragma once

#include <asio/buffer.hpp>
#include <asio/generic/stream_protocol.hpp>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/detail/comm/message_communicator.hpp"
#include "socket/connect.hpp"

namespace dualpipe::detail {

class Link;

/// What a link reports, on the I/O thread except for sent().
class LinkOwner {
 public:
  virtual void arrived(Link& link, Message message) = 0;
  virtual void aborted(Link& link, int origin, const std::string& reason) = 0;
  virtual void said_goodbye(Link& link) = 0;
  /// The connection has ended without a goodbye, or has brought nonsense; `why` completes "rank 2 …".
  virtual void lost(Link& link, const std::string& why) = 0;
  /// This rank cannot go on receiving.
  virtual void failed_here(const std::string& why) = 0;
  /// The bytes of a message have left; on the thread that wrote the last of them.
  virtual void sent(const std::shared_ptr<Request>& transfer) = 0;
  /// Whether reading ahead of the receives may pause.
  virtual bool may_hold_back() const = 0;

 protected:
  ~LinkOwner() = default;
};

/// The connection to one peer. Reads on the I/O thread, straight into the memory of new tensors; writes from the memory
/// of the sent ones, small messages on the calling thread where nothing is queued, else on the I/O thread.
class Link : public std::enable_shared_from_this<Link> {
 public:
  Link(Connection connection, LinkOwner& owner);

  int peer() const { return peer_; }
  /// Once.
  void start_reading();
  /// Any thread. Calls LinkOwner::sent() unless the connection breaks before.
  void send(const Message& message, std::shared_ptr<Request> transfer);
  void say_goodbye();
  /// Ahead of everything that is queued but what has already been sent in part; the rest is dropped.
  void abort(int origin, const std::string& reason);
  /// Whether nothing of what was to be sent depends on this process any more.
  bool flushed() const;
  /// Reads at least one more message if reading has paused. Any thread.
  void resume();

 private:
  struct Outgoing {
    std::string head;
    std::uint64_t payload = 0;                    ///< bytes in `parcel`
    std::shared_ptr<MessageTensors> parcel = {};  ///< may be null
    std::shared_ptr<Request> transfer = {};       ///< may be null
    std::uint64_t sent = 0;                       ///< of both head and payload
  };
  using Finished = std::vector<std::shared_ptr<Request>>;

  void enqueue(Outgoing outgoing);
  void write(Finished& finished);  // mutex held
  void continue_writing();
  void report(const Finished& finished);

  void read_more();
  void parse();
  /// Takes one whole frame's prefix and head, and what has come of its payload, from the buffer. @return false if there
  /// is none yet.
  bool parse_frame();
  void finish_message();
  /// @return whether reading pauses.
  bool hold_back();
  void ended(const asio::error_code& error);
  template <class Action>
  void guarded(const Action& action) noexcept;
  void taken(std::int64_t bytes);

  const int peer_;
  LinkOwner& owner_;
  asio::generic::stream_protocol::socket socket_;
  const int handle_;  ///< of socket_, whose own functions are for one thread only
  const bool local_;  ///< a Unix domain socket
  const std::int64_t clock_offset_ns_;

  mutable std::mutex mutex_;  // of the four below
  std::deque<Outgoing> queue_;
  bool writer_scheduled_ = false;
  bool broken_ = false;

  // The I/O thread's.
  std::vector<char> buffer_;
  std::size_t begin_ = 0, end_ = 0;  ///< what is in the buffer but not parsed
  Message incoming_;
  std::vector<asio::mutable_buffer> missing_;  ///< of the incoming message
  std::uint64_t incoming_bytes_ = 0;

  std::atomic<bool> over_{false};      ///< nothing more will be read: the peer has left, has failed, or sent nonsense
  std::atomic<std::int64_t> held_{0};  ///< bytes that have arrived and were not taken
  std::atomic<bool> paused_{false};
};

}  // namespace dualpipe::detail
