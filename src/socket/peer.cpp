#include "socket/peer.hpp"
#include "contact/handshake.hpp"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <asio/post.hpp>
#include <asio/read.hpp>
#include <cerrno>
#include <cstring>
#include <utility>

namespace dualpipe::detail {
namespace {

/// Unmatched messages may take this much memory per peer before reading pauses.
constexpr std::int64_t held_back_limit = 64 << 20;
/// The sending thread writes messages up to this size itself; waking the I/O thread costs more than copying them.
constexpr std::uint64_t direct_write_limit = 64 << 10;
/// Of the buffer through which heads and small payloads are read, several messages at a time.
constexpr std::size_t buffer_size = 64 << 10;
/// Bytes that are read at a time straight into tensors.
constexpr std::size_t largest_read = 1 << 20;
/// Pieces of memory per system call.
constexpr std::size_t max_pieces = 64;

/// Lists the memory of `head` and `tensors` from byte `skip` on. @return the number of pieces
std::size_t list_pieces(const std::string& head, const MessageTensors* tensors, std::uint64_t skip,
                        std::array<iovec, max_pieces>& pieces) {
  std::size_t count = 0;
  const auto add = [&](const void* data, std::size_t size) {
    if (skip >= size) {
      skip -= size;
      return;
    }
    pieces[count++] = {const_cast<char*>(static_cast<const char*>(data)) + skip, size - skip};
    skip = 0;
  };
  add(head.data(), head.size());
  if (tensors == nullptr) return count;
  for (const at::Tensor& tensor : tensors->tensors()) {
    if (count == pieces.size()) break;
    if (tensor.defined()) add(tensor.data_ptr(), tensor.nbytes());
  }
  return count;
}

}  // namespace

Peer::Peer(Connection connection, PeerOwner& owner)
    : rank_(connection.peer),
      owner_(owner),
      socket_(std::move(connection.socket)),
      handle_(socket_.native_handle()),
      local_(socket_.local_endpoint().protocol().family() == AF_UNIX),
      clock_offset_ns_(connection.clock_offset_ns),
      broken_on_the_way_(connection.broken),
      buffer_(buffer_size) {}

// ---- writing

void Peer::send(const Message& message, std::shared_ptr<Request> request) {
  const std::uint64_t payload = wire::payload_bytes(message.tensors->tensors());
  enqueue({wire::message_frame(message.header, payload), payload, message.tensors, std::move(request)});
}

void Peer::send(const Vote& vote) { enqueue({wire::vote_frame(vote)}); }

void Peer::say_goodbye(const wire::Goodbye& goodbye) { enqueue({wire::goodbye_frame(goodbye)}); }

void Peer::beat() {
  {
    const std::lock_guard lock(mutex_);
    if (!queue_.empty()) return;
  }
  enqueue({wire::beat_frame()});
}

void Peer::ask() { enqueue({wire::question_frame()}, /*urgent=*/true); }

void Peer::answer(const RankActivity& activity) { enqueue({wire::answer_frame(activity)}, /*urgent=*/true); }

void Peer::shut() noexcept { ::shutdown(handle_, SHUT_RDWR); }

void Peer::tell(const wire::Failure& failure) {
  std::vector<Outgoing> dropped;
  {
    const std::lock_guard lock(mutex_);
    for (; !queue_.empty() && queue_.back().sent == 0; queue_.pop_back()) dropped.push_back(std::move(queue_.back()));
  }
  // Its tensors, which may run code of the user, end where no lock is held.
  asio::post(socket_.get_executor(), [tensors = std::make_shared<std::vector<Outgoing>>(std::move(dropped))] {});
  enqueue({wire::failure_frame(failure)});
}

void Peer::enqueue(Outgoing outgoing, bool urgent) {
  Requests finished;
  {
    const std::lock_guard lock(mutex_);
    if (broken_) return;
    const bool directly = queue_.empty() && !writer_scheduled_ && outgoing.payload <= direct_write_limit;
    const auto behind = !urgent ? queue_.end() : queue_.begin() + (queue_.empty() || queue_.front().sent == 0 ? 0 : 1);
    queue_.insert(behind, std::move(outgoing));
    if (directly) write(finished);
    if (!queue_.empty() && !writer_scheduled_) {
      writer_scheduled_ = true;
      asio::post(socket_.get_executor(), [self = shared_from_this()] { self->continue_writing(); });
    }
  }
  report(finished);
}

void Peer::write(Requests& finished) {
  std::array<iovec, max_pieces> pieces;
  while (!queue_.empty()) {
    Outgoing& front = queue_.front();
    msghdr message{};
    message.msg_iov = pieces.data();
    message.msg_iovlen = list_pieces(front.head, front.tensors.get(), front.sent, pieces);
    const ssize_t written = ::sendmsg(handle_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (written < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      // The reader finds out why: the peer's goodbye or abort may still arrive.
      broken_ = true;
      queue_.clear();
      return;
    }
    front.sent += static_cast<std::uint64_t>(written);
    if (front.sent < front.head.size() + front.payload) continue;
    if (front.request) finished.push_back(std::move(front.request));
    queue_.pop_front();
  }
}

void Peer::continue_writing() {
  Requests finished;
  {
    const std::lock_guard lock(mutex_);
    write(finished);
    writer_scheduled_ = !queue_.empty();
    if (writer_scheduled_) {
      socket_.async_wait(asio::socket_base::wait_write,
                         [self = shared_from_this()](const asio::error_code&) { self->continue_writing(); });
    }
  }
  report(finished);
}

void Peer::report(const Requests& finished) {
  for (const auto& request : finished) owner_.sent(request);
}

bool Peer::flushed() const {
  if (over_) return true;  // the peer does not listen any more
  const std::lock_guard lock(mutex_);
  if (broken_) return true;
  if (!queue_.empty()) return false;
  // Closing a TCP socket that has unread input discards what the peer has not acknowledged. A Unix domain socket has
  // delivered everything.
  int unacknowledged = 0;
  return local_ || ::ioctl(handle_, SIOCOUTQ, &unacknowledged) != 0 || unacknowledged == 0;
}

// ---- reading

template <class Action>
void Peer::guarded(const Action& action) noexcept {
  try {
    try {
      action();
    } catch (const wire::Malformed& error) {
      over_ = true;
      owner_.lost(*this, str("sent something that is no message: ", error.what()), /*suspected=*/true);
    } catch (const std::exception& error) {  // above all: no memory
      over_ = true;
      owner_.failed_here(str("cannot receive ", incoming_bytes_, " bytes from rank ", rank_, ": ", error.what()));
    }
  } catch (...) {
    over_ = true;  // no memory even for an error message: the deadlines remain
  }
}

void Peer::start_reading() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] { self->read_more(); });
}

void Peer::read_more() {
  // Makes room for the rest of a head.
  if (begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  socket_.async_read_some(asio::buffer(buffer_.data() + end_, buffer_.size() - end_),
                          [self = shared_from_this()](const asio::error_code& error, std::size_t bytes) {
                            if (error) return self->ended(error);
                            self->listen_anew();
                            self->end_ += bytes;
                            self->guarded([&] { self->parse(); });
                          });
}

void Peer::parse() {
  while (!over_ && parse_frame()) {
    if (!missing_.empty()) {
      const auto more = [self = shared_from_this()](const asio::error_code& error, std::size_t) {
        self->listen_anew();
        return error ? 0 : largest_read;
      };
      asio::async_read(socket_, missing_, more,
                       [self = shared_from_this()](const asio::error_code& error, std::size_t) {
                         if (error) return self->ended(error);
                         self->guarded([&] {
                           self->missing_.clear();
                           self->finish_message();
                           if (!self->hold_back()) self->parse();
                         });
                       });
      return;
    }
    if (hold_back()) return;
  }
  if (!over_) read_more();
}

bool Peer::parse_frame() {
  const std::string_view available(buffer_.data() + begin_, end_ - begin_);
  if (available.size() < sizeof(wire::Prefix)) return false;
  const wire::Prefix prefix = wire::read_prefix(available.substr(0, sizeof(wire::Prefix)));
  const std::size_t head_end = sizeof(wire::Prefix) + prefix.head_bytes;
  if (available.size() < head_end) {
    if (buffer_.size() < head_end) buffer_.resize(head_end);
    return false;
  }
  const std::string_view head = available.substr(sizeof(wire::Prefix), prefix.head_bytes);
  begin_ += head_end;
  switch (prefix.kind) {
    case wire::Kind::goodbye: {
      const wire::Goodbye goodbye = wire::read_goodbye(head);
      over_ = true;
      owner_.said_goodbye(*this, goodbye);
      return true;
    }
    case wire::Kind::vote:
      owner_.voted(*this, wire::read_vote(head));
      return true;
    case wire::Kind::failure:
      owner_.told_of_failure(*this, wire::read_failure(head));
      return true;
    case wire::Kind::beat:
      return true;
    case wire::Kind::question:
      owner_.asked(*this);
      return true;
    case wire::Kind::answer:
      owner_.answered(*this, wire::read_answer(head));
      return true;
    case wire::Kind::message:
      break;
  }

  incoming_bytes_ = prefix.payload_bytes;
  incoming_.header = wire::read_header(head);
  // The offset is an estimate; a message is never issued after it has arrived.
  incoming_.header.issued_ns = std::min(incoming_.header.issued_ns + clock_offset_ns_, now_ns());
  Tensors tensors = wire::allocate(incoming_.header, prefix.payload_bytes);
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined() || tensor.nbytes() == 0) continue;
    char* const data = static_cast<char*>(tensor.data_ptr());
    const std::size_t here = std::min(tensor.nbytes(), end_ - begin_);
    std::memcpy(data, buffer_.data() + begin_, here);
    begin_ += here;
    if (here < tensor.nbytes()) missing_.emplace_back(data + here, tensor.nbytes() - here);
  }
  incoming_.tensors = MessageTensors::of_fresh(std::move(tensors));
  if (missing_.empty()) finish_message();
  return true;
}

void Peer::finish_message() {
  const auto bytes = static_cast<std::int64_t>(incoming_bytes_);
  held_ += bytes;
  incoming_.accepted = [weak = weak_from_this(), bytes] {
    if (const auto self = weak.lock()) self->taken(bytes);
  };
  owner_.arrived(*this, std::exchange(incoming_, {}));
}

bool Peer::hold_back() {
  const auto enough = [this] { return held_ > held_back_limit && owner_.may_hold_back(); };
  if (!enough()) return false;
  paused_ = true;
  // Checked again: whoever changes the result of enough() looks at paused_ afterwards.
  if (enough()) return true;
  return !paused_.exchange(false);
}

void Peer::taken(std::int64_t bytes) {
  held_ -= bytes;
  if (held_ <= held_back_limit) resume();
}

void Peer::resume() {
  if (!paused_) return;
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    if (self->paused_.exchange(false)) self->guarded([&] { self->parse(); });
  });
}

void Peer::ended(const asio::error_code& error) {
  if (over_ || error == asio::error::operation_aborted) return;
  over_ = true;
  const bool broken = broken_on_the_way_ != nullptr && *broken_on_the_way_;
  const bool closed = !broken && closed_by_peer(error);
  guarded([&] {
    owner_.lost(*this,
                closed
                    ? "closed its connection without saying goodbye (killed?)"
                    : str("cannot be reached any more (", broken ? "its encrypted connection broke" : error.message(),
                          "): has its host or the network failed?"),
                /*suspected=*/!closed);
  });
}

}  // namespace dualpipe::detail
