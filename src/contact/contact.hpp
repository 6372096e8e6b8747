#pragma once

#include <asio/io_context.hpp>
#include <asio/ip/address.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/steady_timer.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "contact/encryption.hpp"
#include "contact/handshake.hpp"

// How two ranks of a run come to a connection: one listens, the other calls. Everything here is used by the thread that
// runs the io_context.
namespace dualpipe::detail {

/// The addresses of the two ends of a TCP connection; unspecified for a Unix domain socket.
struct Ends {
  asio::ip::address own, other;
  bool are_far() const { return !own.is_unspecified(); }
};

/// A connection whose two ends have made sure of each other.
struct Contact {
  int rank = -1;         ///< at the other end
  int size = 0;          ///< of the world, as the other end has it
  Bytes32 meeting = {};  ///< what the other end meets for
  StreamSocket socket;
  std::int64_t clock_offset_ns = 0;  ///< added to the other end's clock it gives this one's
  Ends ends = {};
  Broken broken = {};
};

/// What both ends of a connection know before.
struct Introduction {
  Greeting own;
  std::string key;
  Encryption* encryption = nullptr;     ///< of what crosses hosts; null: none
  bool encryption_is_optional = false;  ///< callers decide
  /// @return why the other end is not the one that is meant, or does not meet here; empty if it is, and does.
  std::function<std::string(const Greeting& theirs, const Ends& ends)> check;
};

/// A name for an abstract Unix domain socket that nobody can know before.
std::string random_unix_name();
/// Of an abstract Unix domain socket.
asio::generic::stream_protocol::endpoint unix_endpoint(const std::string& name);

/// Lets ranks call this one. Strangers cost it a descriptor for five seconds each; it keeps a bounded number of them.
class Listener {
 public:
  using Admitted = std::function<void(Contact contact)>;

  /// @param num_callers  ranks that may call at the same time.
  Listener(asio::io_context& io, Introduction introduction, int num_callers, Admitted admitted);
  ~Listener() { close(); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  /// On the abstract Unix domain socket `name`. @throws asio::system_error  it is taken.
  void listen_here(const std::string& name);
  /// @return the port. @throws asio::system_error  the address is taken or not of this host.
  std::uint16_t listen_at(const asio::ip::tcp::endpoint& endpoint);
  bool is_open() const { return !doors_.empty(); }
  /// Somebody has called and is not admitted so far.
  bool is_being_called() const;
  /// Nobody can call any more; handshakes end.
  void close() noexcept;

 private:
  struct Door;
  void open(const asio::generic::stream_protocol::endpoint& endpoint);
  void accept(const std::shared_ptr<Door>& door);
  /// @return false: this process has no room for a connection.
  bool accept_one(Door& door);
  void meet(StreamSocket socket);
  void forget_ended();

  asio::io_context& io_;
  const Introduction introduction_;
  const std::size_t limit_;
  const Admitted admitted_;
  std::vector<std::shared_ptr<Door>> doors_;
  std::list<std::shared_ptr<Handshake>> handshakes_;
};

/// Somewhere a rank can be called.
struct Place {
  std::string name;  ///< as in "its Unix domain socket"
  std::optional<asio::generic::stream_protocol::endpoint> endpoint;
  std::string problem;  ///< why there is no endpoint
};

/// Calls one rank, at one place after the other, until it answers.
class Caller : public std::enable_shared_from_this<Caller> {
 public:
  using Places = std::function<std::vector<Place>()>;
  using Connected = std::function<void(Contact contact)>;

  /// @param places  looked up again after each round; at least one.
  Caller(asio::io_context& io, Introduction introduction, Places places, Connected connected);
  void start();
  void close() noexcept;
  /// "its Unix domain socket (Connection refused), 10.0.0.1:29500 (no answer)"
  std::string outcomes() const;
  /// Whether one of these is "no answer".
  bool lacks_answers() const;

 private:
  void call_next();
  void connect(const Place& place);
  void call_again(const std::string& place, const std::string& problem);

  asio::io_context& io_;
  const Introduction introduction_;
  const Places places_;
  Connected connected_;
  asio::steady_timer timer_;
  std::vector<Place> left_;  ///< of this round, the next one last
  std::map<std::string, std::string> outcomes_;
  std::shared_ptr<StreamSocket> connecting_;
  std::shared_ptr<Handshake> handshake_;
  bool closed_ = false;
};

}  // namespace dualpipe::detail
