#pragma once

#include <asio/error.hpp>
#include <asio/generic/stream_protocol.hpp>
#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "contact/protocol.hpp"
#include "contact/secrets.hpp"

namespace dualpipe::detail {

/// The outcome of a call that nobody answers, whether or not somebody accepts it.
inline constexpr const char* no_answer = "no answer";

/// Why a connection to those who do not meet here is closed.
inline constexpr const char* another_meeting =
    "another job or communicator answers there, or one with another DUALPIPE_SECRET_FILE";

/// The other end has closed the connection, or died. If it had not read all by then, that is a reset.
inline bool closed_by_peer(const asio::error_code& error) {
  return error == asio::error::eof || error == asio::error::connection_reset;
}

using StreamSocket = asio::generic::stream_protocol::socket;

/// The first bytes on a connection, in either direction. Nothing in it is secret.
struct Greeting {
  std::uint64_t magic = wire::protocol_magic;
  std::uint32_t version = wire::protocol_version;
  std::int32_t rank = 0;
  std::int32_t size = 0;  ///< of the world
  std::int32_t zero = 0;
  std::int64_t clock_ns = 0;
  Bytes32 meeting{};  ///< which ranks meet here, and for what: run, communicator, epoch
  Bytes32 nonce{};    ///< random
};

/// Two ends of a new connection make sure of each other. Each sends a greeting and then proves, by a code over both
/// greetings, that it has the key: the listener only to a caller that has proved it. On a Unix domain socket the kernel
/// also says which user the other end belongs to; it must be the same.
///
/// A connection takes five seconds at most, so that a stranger is forgotten. Used by the thread that runs the io_context.
class Handshake : public std::enable_shared_from_this<Handshake> {
 public:
  enum class Side { caller, listener };
  /// @return why the other end is not the one that is meant; empty if it is.
  using Check = std::function<std::string(const Greeting& theirs)>;
  /// Called once. `problem` is empty, or says why the connection is closed.
  using Done = std::function<void(Handshake& handshake, const std::string& problem)>;

  /// @param socket  connected.
  /// @param key     of both ends; may be empty, which proves nothing.
  Handshake(asio::io_context& io, StreamSocket socket, Side side, const Greeting& own, std::string_view key,
            Check check, Done done);

  /// @param spoken  of a listener: called when the caller has begun to speak; may put another socket in place of this.
  void start(const std::function<void(StreamSocket& socket)>& spoken = {});
  /// Closes the connection.
  void give_up(const std::string& problem);
  bool is_over() const { return over_; }

  const Greeting& theirs() const { return theirs_; }
  /// Added to the other end's clock it gives this one's. Meaningful where their boots differ.
  std::int64_t clock_offset_ns() const { return clock_offset_ns_; }
  /// The connection, after success.
  StreamSocket take() { return std::move(socket_); }

 private:
  /// Gives up after so many seconds.
  void wait(int seconds);
  void greet();
  void read_greeting();
  void greeted();
  void write_proof();
  void read_proof();
  void succeed();
  Bytes32 proof_of(Side side) const;
  /// A completion handler: goes on with `next` unless there was an error.
  template <class Next>
  auto then(Next next);

  StreamSocket socket_;
  asio::steady_timer timer_;
  const Side side_;
  Greeting own_;
  Greeting theirs_;
  const std::string key_;
  const Check check_;
  Done done_;
  Bytes32 sent_proof_{}, got_proof_{};
  std::int64_t clock_offset_ns_ = 0;
  bool over_ = false;
};

/// Why the process at the other end of a Unix domain socket is not to be trusted; empty if it belongs to this user, or
/// for sockets of other kinds.
std::string stranger_at(StreamSocket& socket);

}  // namespace dualpipe::detail
