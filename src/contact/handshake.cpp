#include "contact/handshake.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <asio/read.hpp>
#include <asio/write.hpp>
#include <chrono>
#include <type_traits>
#include <utility>

#include "dualpipe/detail/host.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace {

/// Longest time of one handshake.
constexpr int limit_in_seconds = 5;

static_assert(std::has_unique_object_representations_v<Greeting>, "its bytes travel");

std::string_view bytes_of(const Greeting& greeting) {
  return {reinterpret_cast<const char*>(&greeting), sizeof greeting};
}

}  // namespace

std::string stranger_at(StreamSocket& socket) {
  asio::error_code error;
  const auto end = socket.local_endpoint(error);
  if (error) return error.message();
  if (end.protocol().family() != AF_UNIX) return "";
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(socket.native_handle(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
    return "the kernel does not say whose process it is";
  return peer.uid == ::geteuid() ? "" : str("a process of user ", peer.uid, ", this one is of user ", ::geteuid());
}

Handshake::Handshake(asio::io_context& io, StreamSocket socket, Side side, const Greeting& own, std::string_view key,
                     Check check, Done done)
    : socket_(std::move(socket)),
      timer_(io),
      side_(side),
      own_(own),
      key_(key),
      check_(std::move(check)),
      done_(std::move(done)) {}

template <class Next>
auto Handshake::then(Next next) {
  return [self = shared_from_this(), next](const asio::error_code& error, std::size_t = 0) {
    if (self->over_) return;
    if (error)
      self->give_up(closed_by_peer(error) ? "it closes the connection" : error.message());
    else
      next(*self);
  };
}

void Handshake::start(const std::function<void(StreamSocket&)>& spoken) {
  wait(limit_in_seconds);
  if (const std::string stranger = stranger_at(socket_); !stranger.empty()) return give_up(stranger);
  own_.nonce = random_bytes();
  if (side_ == Side::caller) return greet();
  if (!spoken) return read_greeting();
  socket_.async_wait(StreamSocket::wait_read, then([spoken](Handshake& self) {
                       spoken(self.socket_);
                       self.read_greeting();
                     }));
}

/// Counts them one by one: a process that was stopped meanwhile loses one at most, and then sees what has come.
void Handshake::wait(int seconds) {
  if (seconds == 0) return give_up(no_answer);
  timer_.expires_after(std::chrono::seconds(1));
  timer_.async_wait([weak = weak_from_this(), seconds](const asio::error_code& error) {
    const auto self = weak.lock();
    if (!error && self && !self->over_) self->wait(seconds - 1);
  });
}

void Handshake::give_up(const std::string& problem) {
  if (std::exchange(over_, true)) return;
  timer_.cancel();
  asio::error_code ignored;
  socket_.close(ignored);
  const auto self = shared_from_this();  // until done_, which may forget it, returns
  std::exchange(done_, {})(*this, problem);
}

void Handshake::greet() {
  own_.clock_ns = now_ns();
  asio::async_write(socket_, asio::buffer(&own_, sizeof own_),
                    then([](Handshake& self) { self.side_ == Side::caller ? self.read_greeting() : self.greeted(); }));
}

void Handshake::read_greeting() {
  asio::async_read(socket_, asio::buffer(&theirs_, sizeof theirs_), then([](Handshake& self) {
                     if (self.theirs_.magic != wire::protocol_magic) return self.give_up("somebody else answers");
                     if (self.side_ == Side::listener) {
                       self.clock_offset_ns_ = now_ns() - self.theirs_.clock_ns;
                       return self.greet();
                     }
                     self.clock_offset_ns_ = (self.own_.clock_ns + now_ns()) / 2 - self.theirs_.clock_ns;
                     self.greeted();
                   }));
}

void Handshake::greeted() {
  std::string problem;
  if (theirs_.version != own_.version)
    problem = str("it speaks protocol version ", theirs_.version, ", this rank ", own_.version,
                  ": start all ranks from one build");
  else
    problem = check_(theirs_);
  if (!problem.empty()) return give_up(problem);
  side_ == Side::caller ? write_proof() : read_proof();
}

Bytes32 Handshake::proof_of(Side side) const {
  const bool own_first = side_ == Side::caller;
  return authentication_code(key_, {side == Side::caller ? "caller" : "listener", bytes_of(own_first ? own_ : theirs_),
                                    bytes_of(own_first ? theirs_ : own_)});
}

void Handshake::write_proof() {
  sent_proof_ = proof_of(side_);
  asio::async_write(socket_, asio::buffer(sent_proof_),
                    then([](Handshake& self) { self.side_ == Side::caller ? self.read_proof() : self.succeed(); }));
}

void Handshake::read_proof() {
  const Side other = side_ == Side::caller ? Side::listener : Side::caller;
  asio::async_read(socket_, asio::buffer(got_proof_), then([other](Handshake& self) {
                     if (!equal_codes(self.got_proof_, self.proof_of(other)))
                       return self.give_up("it does not have the secret of this job");
                     self.side_ == Side::caller ? self.succeed() : self.write_proof();
                   }));
}

void Handshake::succeed() {
  over_ = true;
  timer_.cancel();
  const auto self = shared_from_this();
  std::exchange(done_, {})(*this, "");
}

}  // namespace dualpipe::detail
