#include "socket/connect.hpp"

#include <fcntl.h>
#include <netinet/tcp.h>

#include <algorithm>
#include <array>
#include <asio/ip/tcp.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/read.hpp>
#include <asio/steady_timer.hpp>
#include <asio/write.hpp>
#include <map>
#include <optional>

#include "socket/announcement.hpp"
#include "socket/wire.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;
using Socket = asio::generic::stream_protocol::socket;
using Endpoint = asio::generic::stream_protocol::endpoint;
using asio::ip::tcp;
using Unix = asio::local::stream_protocol;

/// Longest time of one try to reach a peer, and longest silence of a stranger.
constexpr auto attempt_limit = 5s;
constexpr auto attempt_pause = 20ms;

/// The first bytes on a connection, in either direction.
struct Hello {
  std::uint64_t magic = wire::protocol_magic;
  std::uint32_t version = wire::protocol_version;
  std::int32_t rank = 0;
  std::int32_t size = 0;
  std::int32_t epoch = 0;
  std::array<char, Announcements::token_length> token{};  ///< of the listening side
  std::int64_t clock_ns = 0;
};

/// The calls to one rank so far.
struct Calls {
  std::size_t count = 0;
  std::map<std::string, std::string> outcomes;  ///< of the last call to each place
};

/// A connection before both ends have identified each other.
struct Attempt {
  Attempt(asio::io_context& io, Socket connection) : socket(std::move(connection)), timer(io) {}
  Socket socket;
  asio::steady_timer timer;
  std::string place;
  Hello sent, got;
};

class ConnectionBuilder {
 public:
  ConnectionBuilder(const World& world, Rendezvous& rendezvous, int epoch, Rendezvous::Clock::time_point deadline,
                    Route route)
      : world_(world),
        epoch_(epoch),
        deadline_(deadline),
        announcements_(world, rendezvous, route),
        calls_(world.size),
        sockets_(world.size),
        offsets_(world.size, 0) {}

  std::vector<Connection> build(asio::io_context& io) {
    listen();
    for (int rank = 0; rank < world_.rank; ++rank) call(rank);
    run_until([this] { return connected() == world_.size - 1; });
    if (const auto missing = first_missing()) throw failure(*missing, why_missing(*missing));
    unix_.close();
    tcp_.close();
    agree_to_begin();
    return hand_over(io);
  }

 private:
  void listen() {
    // Opened before anybody learns their addresses.
    if (!announcements_.own().unix_name.empty()) unix_ = Unix::acceptor(io_, unix_endpoint(world_.rank));
    announcements_.exchange();
    if (announcements_.has_far_callers()) {
      tcp_ = tcp_acceptor();
      announcements_.announce(tcp_.local_endpoint().port());
    }
    announcements_.read_far_endpoints();
    if (unix_.is_open()) accept(unix_);
    if (tcp_.is_open()) accept(tcp_);
  }

  tcp::acceptor tcp_acceptor() {
    try {
      return {io_, tcp::endpoint(tcp::v6(), 0)};  // takes IPv4 as well
    } catch (const asio::system_error&) {
      return {io_, tcp::endpoint(tcp::v4(), 0)};
    }
  }

  Unix::endpoint unix_endpoint(int rank) const { return {std::string(1, '\0') + announcements_[rank].unix_name}; }

  /// Whether it comes from a rank of this run: only these know the token. Others are dropped without an answer.
  bool is_valid(const Hello& hello, const std::string& token) const {
    return hello.magic == wire::protocol_magic && hello.version == wire::protocol_version &&
           hello.size == world_.size && hello.epoch == epoch_ &&
           std::equal(token.begin(), token.end(), hello.token.begin(), hello.token.end());
  }

  Hello hello(const std::string& token) const {
    Hello own;
    own.rank = world_.rank;
    own.size = world_.size;
    own.epoch = epoch_;
    std::copy(token.begin(), token.end(), own.token.begin());
    own.clock_ns = now_ns();
    return own;
  }

  std::shared_ptr<Attempt> attempt(Socket socket) {
    auto result = std::make_shared<Attempt>(io_, std::move(socket));
    result->timer.expires_after(attempt_limit);
    result->timer.async_wait([weak = std::weak_ptr(result)](const asio::error_code& error) {
      const auto late = weak.lock();
      if (!error && late) late->socket.close();
    });
    return result;
  }

  template <class Acceptor>
  void accept(Acceptor& acceptor) {
    acceptor.async_accept([this, &acceptor](const asio::error_code& error, auto socket) {
      if (error == asio::error::operation_aborted) return;
      if (error && error != asio::error::connection_aborted)
        throw asio::system_error(error, "cannot accept connections");
      if (!error) greet(attempt(Socket(std::move(socket))));
      accept(acceptor);
    });
  }

  /// Reads the hello of a caller, and answers.
  void greet(const std::shared_ptr<Attempt>& attempt) {
    asio::async_read(
        attempt->socket, asio::buffer(&attempt->got, sizeof(Hello)),
        [this, attempt](const asio::error_code& error, std::size_t) {
          const Hello& got = attempt->got;
          if (error || !is_valid(got, announcements_.own().token) || got.rank <= world_.rank || got.rank >= world_.size)
            return;
          attempt->sent = hello(announcements_.own().token);
          asio::async_write(attempt->socket, asio::buffer(&attempt->sent, sizeof(Hello)),
                            [this, attempt](const asio::error_code& failed, std::size_t) {
                              if (!failed) keep(attempt->got.rank, *attempt, now_ns() - attempt->got.clock_ns);
                            });
        });
  }

  /// A completion handler: runs `step`, or calls again after an error.
  template <class Step>
  auto then(int rank, const std::shared_ptr<Attempt>& attempt, const Step& step) {
    return [this, rank, attempt, step](const asio::error_code& error, std::size_t = 0) {
      if (error)
        call_again(rank, attempt, error == asio::error::operation_aborted ? "no answer" : error.message());
      else
        step();
    };
  }

  /// Connects to a lower rank; tries again until it answers.
  void call(int rank) {
    Calls& calls = this->calls(rank);
    auto attempt = this->attempt(Socket(io_));
    Endpoint endpoint;
    if (announcements_.is_near(rank)) {
      endpoint = unix_endpoint(rank);
      attempt->place = "its Unix domain socket";
    } else if (const auto& endpoints = announcements_[rank].endpoints; !endpoints.empty()) {
      const tcp::endpoint& next = endpoints[calls.count++ % endpoints.size()];
      endpoint = next;
      attempt->place = str(next);
    } else {
      attempt->place = "an address";
      return call_again(rank, attempt, "its host has none");
    }
    calls.outcomes.emplace(attempt->place, "no answer");

    const auto finish = then(rank, attempt, [=, this] {
      if (!is_valid(attempt->got, announcements_[rank].token) || attempt->got.rank != rank)
        return call_again(rank, attempt, "somebody else answers");
      keep(rank, *attempt, (attempt->sent.clock_ns + now_ns()) / 2 - attempt->got.clock_ns);
    });
    const auto read_answer = then(
        rank, attempt, [=] { asio::async_read(attempt->socket, asio::buffer(&attempt->got, sizeof(Hello)), finish); });
    const auto write_hello = then(rank, attempt, [=, this] {
      attempt->sent = hello(announcements_[rank].token);
      asio::async_write(attempt->socket, asio::buffer(&attempt->sent, sizeof(Hello)), read_answer);
    });
    attempt->socket.async_connect(endpoint, write_hello);
  }

  void call_again(int rank, const std::shared_ptr<Attempt>& failed, const std::string& problem) {
    calls(rank).outcomes[failed->place] = problem;
    failed->socket = Socket(io_);  // closes it
    failed->timer.expires_after(attempt_pause);
    failed->timer.async_wait([this, rank, failed](const asio::error_code& error) {
      if (error) return;
      announcements_.read_again(rank);
      call(rank);
    });
  }

  void keep(int rank, Attempt& attempt, std::int64_t clock_offset_ns) {
    attempt.timer.cancel();
    Socket& socket = attempt.socket;
    const int fd = socket.native_handle();
    // A program that this process starts must not keep the connection open after its death.
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (socket.local_endpoint().protocol().family() != AF_UNIX) {
      socket.set_option(tcp::no_delay(true));
      // Where nobody looks for silent ranks, an idle connection notices within half a minute that a host is gone.
      const auto set = [fd](int level, int option, int value) {
        ::setsockopt(fd, level, option, &value, sizeof value);
      };
      set(SOL_SOCKET, SO_KEEPALIVE, 1);
      set(IPPROTO_TCP, TCP_KEEPIDLE, 10);
      set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
      set(IPPROTO_TCP, TCP_KEEPCNT, 3);
    }
    sockets_[rank] = std::move(socket);
    offsets_[rank] = announcements_.is_near(rank) ? 0 : clock_offset_ns;
  }

  /// A barrier: each rank that has all its connections sends one byte to every other.
  void agree_to_begin() {
    std::vector<bool> ready(sockets_.size(), false);
    ready[world_.rank] = true;
    std::vector<std::uint8_t> bytes(sockets_.size(), 0);
    std::optional<int> gone;
    int unsent = world_.size - 1;
    static constexpr std::uint8_t ready_byte = 'R';
    for (std::size_t i = 0; i < sockets_.size(); ++i) {
      if (ready[i]) continue;
      const auto note = [&, i](const asio::error_code& error) {
        if (error) gone = static_cast<int>(i);
      };
      asio::async_write(*sockets_[i], asio::buffer(&ready_byte, 1),
                        [&, note](const asio::error_code& error, std::size_t) {
                          note(error);
                          --unsent;
                        });
      asio::async_read(*sockets_[i], asio::buffer(&bytes[i], 1),
                       [&, note, i](const asio::error_code& error, std::size_t) {
                         note(error);
                         ready[i] = true;
                       });
    }
    run_until([&] { return gone || (unsent == 0 && std::find(ready.begin(), ready.end(), false) == ready.end()); });
    if (gone) throw failure(*gone, "gave up while the ranks were connecting");
    const auto late = std::find(ready.begin(), ready.end(), false);
    if (late != ready.end())
      throw failure(static_cast<int>(late - ready.begin()), "is connected but still waits for others");
  }

  std::vector<Connection> hand_over(asio::io_context& io) {
    std::vector<Connection> result;
    for (std::size_t i = 0; i < sockets_.size(); ++i) {
      Socket socket(io);
      if (sockets_[i]) {
        const auto protocol = sockets_[i]->local_endpoint().protocol();
        socket.assign(protocol, sockets_[i]->release());
      }
      result.push_back({static_cast<int>(i), std::move(socket), offsets_[i]});
    }
    return result;
  }

  template <class Condition>
  void run_until(const Condition& condition) {
    try {
      io_.restart();
      while (!condition() && io_.run_one_until(deadline_) > 0) {
      }
    } catch (const asio::system_error& error) {
      throw CommError(world_.rank, "rendezvous", str("rank ", world_.rank, ": ", error.what()));
    }
  }

  int connected() const {
    return static_cast<int>(
        std::count_if(sockets_.begin(), sockets_.end(), [](const auto& socket) { return socket.has_value(); }));
  }
  std::optional<int> first_missing() const {
    for (int rank = 0; rank < world_.size; ++rank)
      if (rank != world_.rank && !sockets_[rank]) return rank;
    return std::nullopt;
  }
  std::string why_missing(int rank) {
    const std::string advice =
        announcements_.is_near(rank) ? "" : "; is there a firewall between the hosts? All TCP ports must be open";
    std::string places;
    const auto add = [&](const auto&... place) { places += str(places.empty() ? "" : ", ", place...); };
    if (rank < world_.rank) {
      for (const auto& [place, outcome] : calls(rank).outcomes) add(place, " (", outcome, ")");
      return "has started but cannot be reached at " + places + advice;
    }
    if (announcements_.is_near(rank)) return "has started but does not connect";
    for (const tcp::endpoint& place : announcements_.own().endpoints) add(place);
    return "has started but does not connect to this one at " + places + advice;
  }
  CommError failure(int rank, const std::string& what) const {
    return {rank, "rendezvous", str("rank ", world_.rank, ": rank ", rank, " ", what)};
  }
  Calls& calls(int rank) { return calls_[rank]; }

  const World& world_;
  const int epoch_;
  const Rendezvous::Clock::time_point deadline_;
  Announcements announcements_;
  std::vector<Calls> calls_;
  asio::io_context io_{1};  // its own: pending handlers end with this object
  Unix::acceptor unix_{io_};
  tcp::acceptor tcp_{io_};
  std::vector<std::optional<Socket>> sockets_;
  std::vector<std::int64_t> offsets_;
};

}  // namespace

std::vector<Connection> connect_all(asio::io_context& io, const World& world, Rendezvous& rendezvous, int epoch,
                                    Rendezvous::Clock::time_point deadline, Route route) {
  return ConnectionBuilder(world, rendezvous, epoch, deadline, route).build(io);
}

}  // namespace dualpipe::detail
