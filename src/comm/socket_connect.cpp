#include "comm/socket_connect.hpp"

#include <netinet/tcp.h>

#include <algorithm>
#include <array>
#include <asio/ip/tcp.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/read.hpp>
#include <asio/steady_timer.hpp>
#include <asio/write.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "comm/socket_host.hpp"
#include "comm/socket_wire.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;
using Socket = asio::generic::stream_protocol::socket;
using Endpoint = asio::generic::stream_protocol::endpoint;
using asio::ip::tcp;
using Unix = asio::local::stream_protocol;

/// One try to reach a peer, and the time a stranger may stay silent.
constexpr auto kAttempt = 5s;
constexpr auto kBetweenAttempts = 20ms;

constexpr std::size_t kTokenLength = 32;

/// Nobody guesses it, so a connection that brings it has read it in the store.
std::string random_token() {
  std::random_device random;
  std::string token;
  while (token.size() < kTokenLength) token += "0123456789abcdef"[random() % 16];
  return token;
}

/// The first bytes on a connection, in both directions.
struct Hello {
  std::uint64_t magic = wire::kMagic;
  std::uint32_t version = wire::kVersion;
  std::int32_t rank = 0;
  std::int32_t size = 0;
  std::int32_t epoch = 0;
  std::array<char, kTokenLength> token{};  ///< of the listening side
  std::int64_t clock_ns = 0;
};

/// What is known of another rank.
struct Peer {
  std::string host, token, unix_name;
  std::vector<tcp::endpoint> endpoints;
  unsigned attempts = 0;
  std::map<std::string, std::string> tried;  ///< where, and what came of it last
};

/// A connection that is being made.
struct Attempt {
  Attempt(asio::io_context& io, Socket connection) : socket(std::move(connection)), timer(io) {}
  Socket socket;
  asio::steady_timer timer;
  std::string place;
  Hello sent, got;
};

class MeshBuilder {
 public:
  MeshBuilder(const World& world, Rendezvous& rendezvous, int epoch, Rendezvous::Clock::time_point deadline,
              Route route)
      : world_(world),
        rendezvous_(rendezvous),
        epoch_(epoch),
        deadline_(deadline),
        host_(host_identity() + (route == Route::tcp ? str(" ", world.rank) : "")),
        token_(random_token()),
        peers_(static_cast<std::size_t>(world.size)),
        sockets_(static_cast<std::size_t>(world.size)),
        offsets_(static_cast<std::size_t>(world.size), 0) {}

  std::vector<Connection> build(asio::io_context& io) {
    exchange_cards();
    if (unix_.is_open()) accept(unix_);
    if (tcp_.is_open()) accept(tcp_);
    for (int peer = 0; peer < world_.rank; ++peer) approach(peer);
    run_until([this] { return connected() == world_.size - 1; });
    if (const auto missing = first_missing()) throw failure(*missing, what_failed(*missing));
    unix_.close();
    tcp_.close();
    agree_to_begin();
    return hand_over(io);
  }

 private:
  void exchange_cards() {
    nlohmann::json card = {{"version", wire::kVersion}, {"size", world_.size}, {"host", host_}, {"token", token_}};
    if (world_.rank + 1 < world_.size) {
      const std::string name = "dualpipe." + token_;
      unix_ = Unix::acceptor(io_, Unix::endpoint(std::string(1, '\0') + name));
      card["unix"] = name;
    }
    rendezvous_.publish("card", card.dump());

    std::vector<int> others;
    for (int peer = 0; peer < world_.size; ++peer)
      if (peer != world_.rank) others.push_back(peer);
    const std::vector<std::string> cards = rendezvous_.collect("card", others);
    for (std::size_t i = 0; i < others.size(); ++i) read_card(others[i], cards[i]);

    const auto far = [this](int peer) { return this->peer(peer).host != host_; };
    if (std::any_of(others.begin(), others.end(), [&](int peer) { return peer > world_.rank && far(peer); }))
      listen_to_hosts();
    std::vector<int> far_listeners;
    std::copy_if(others.begin(), others.end(), std::back_inserter(far_listeners),
                 [&](int peer) { return peer < world_.rank && far(peer); });
    const std::vector<std::string> addresses = rendezvous_.collect("tcp", far_listeners);
    for (std::size_t i = 0; i < addresses.size(); ++i) read_addresses(far_listeners[i], addresses[i]);
  }

  void read_card(int rank, const std::string& text) {
    const auto card = nlohmann::json::parse(text);
    const auto disagree = [&](const char* what, std::int64_t theirs, std::int64_t ours) {
      throw CommError(rank, "rendezvous",
                      str("rank ", world_.rank, ": rank ", rank, " has ", what, " ", theirs, ", this rank ", ours,
                          ": start all ranks from one build and with one WORLD_SIZE"));
    };
    const std::int64_t version = card.at("version");
    const std::int64_t size = card.at("size");
    if (version != wire::kVersion) disagree("protocol version", version, wire::kVersion);
    if (size != world_.size) disagree("WORLD_SIZE", size, world_.size);
    peer(rank).host = card.at("host");
    peer(rank).token = card.at("token");
    peer(rank).unix_name = card.value("unix", "");
  }

  void read_addresses(int rank, const std::string& text) {
    peer(rank).endpoints.clear();
    const auto listener = nlohmann::json::parse(text);
    const std::uint16_t port = listener.at("port");
    for (const std::string address : listener.at("addresses"))
      peer(rank).endpoints.emplace_back(asio::ip::make_address(address), port);
  }

  void listen_to_hosts() {
    try {
      tcp_ = tcp::acceptor(io_, tcp::endpoint(tcp::v6(), 0));  // takes IPv4 as well
    } catch (const asio::system_error&) {
      tcp_ = tcp::acceptor(io_, tcp::endpoint(tcp::v4(), 0));
    }
    const std::uint16_t port = tcp_.local_endpoint().port();
    const std::vector<std::string> addresses = own_addresses(world_);
    rendezvous_.publish("tcp", nlohmann::json({{"port", port}, {"addresses", addresses}}).dump());
    for (const std::string& address : addresses)
      listens_at_ += str(listens_at_.empty() ? "" : ", ", tcp::endpoint(asio::ip::make_address(address), port));
  }

  /// What only a rank of this run knows. Anybody else is dropped without an answer.
  bool is_valid(const Hello& hello, const std::string& token) const {
    return hello.magic == wire::kMagic && hello.version == wire::kVersion && hello.size == world_.size &&
           hello.epoch == epoch_ && std::equal(token.begin(), token.end(), hello.token.begin(), hello.token.end());
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
    result->timer.expires_after(kAttempt);
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

  /// Somebody has connected.
  void greet(std::shared_ptr<Attempt> attempt) {
    asio::async_read(attempt->socket, asio::buffer(&attempt->got, sizeof(Hello)),
                     [this, attempt](const asio::error_code& error, std::size_t) {
                       const Hello& got = attempt->got;
                       if (error || !is_valid(got, token_) || got.rank <= world_.rank || got.rank >= world_.size)
                         return;
                       attempt->sent = hello(token_);
                       asio::async_write(attempt->socket, asio::buffer(&attempt->sent, sizeof(Hello)),
                                         [this, attempt](const asio::error_code& failed, std::size_t) {
                                           if (!failed)
                                             keep(attempt->got.rank, *attempt, now_ns() - attempt->got.clock_ns);
                                         });
                     });
  }

  /// Connects to a lower rank, again and again.
  void approach(int rank) {
    Peer& peer = this->peer(rank);
    auto attempt = this->attempt(Socket(io_));
    Endpoint endpoint;
    if (peer.host == host_) {
      endpoint = Unix::endpoint(std::string(1, '\0') + peer.unix_name);
      attempt->place = "its Unix domain socket";
    } else if (!peer.endpoints.empty()) {
      const tcp::endpoint& next = peer.endpoints[peer.attempts++ % peer.endpoints.size()];
      endpoint = next;
      attempt->place = str(next);
    } else {
      attempt->place = "no address at all";
      return approach_later(rank, attempt, "its host has none");
    }
    peer.tried.emplace(attempt->place, "no answer");
    const auto next = [this, attempt, rank](const asio::error_code& error, auto&& step) {
      if (error)
        approach_later(rank, attempt, error == asio::error::operation_aborted ? "no answer" : error.message());
      else
        step();
    };
    attempt->socket.async_connect(endpoint, [this, attempt, rank, next](const asio::error_code& error) {
      next(error, [&] {
        attempt->sent = hello(this->peer(rank).token);
        asio::async_write(attempt->socket, asio::buffer(&attempt->sent, sizeof(Hello)),
                          [this, attempt, rank, next](const asio::error_code& unsent, std::size_t) {
                            next(unsent, [&] {
                              asio::async_read(
                                  attempt->socket, asio::buffer(&attempt->got, sizeof(Hello)),
                                  [this, attempt, rank, next](const asio::error_code& unread, std::size_t) {
                                    next(unread, [&] {
                                      if (!is_valid(attempt->got, this->peer(rank).token) || attempt->got.rank != rank)
                                        return approach_later(rank, attempt, "somebody else answers");
                                      keep(rank, *attempt,
                                           (attempt->sent.clock_ns + now_ns()) / 2 - attempt->got.clock_ns);
                                    });
                                  });
                            });
                          });
      });
    });
  }

  /// The peer may have moved since: what it published may stem from an earlier life of the same name.
  void approach_later(int rank, const std::shared_ptr<Attempt>& failed, const std::string& problem) {
    peer(rank).tried[failed->place] = problem;
    asio::error_code ignored;
    failed->socket.close(ignored);
    failed->timer.expires_after(kBetweenAttempts);
    failed->timer.async_wait([this, rank, failed](const asio::error_code& error) {
      if (error) return;
      read_card(rank, rendezvous_.collect("card", {rank}).front());
      if (peer(rank).host != host_) read_addresses(rank, rendezvous_.collect("tcp", {rank}).front());
      approach(rank);
    });
  }

  void keep(int rank, Attempt& attempt, std::int64_t clock_offset_ns) {
    attempt.timer.cancel();
    Socket& socket = attempt.socket;
    if (socket.local_endpoint().protocol().family() != AF_UNIX) {
      socket.set_option(tcp::no_delay(true));
      // Notices within half a minute that a host has lost its power or its network.
      const int fd = socket.native_handle();
      const auto set = [fd](int level, int option, int value) {
        ::setsockopt(fd, level, option, &value, sizeof value);
      };
      set(SOL_SOCKET, SO_KEEPALIVE, 1);
      set(IPPROTO_TCP, TCP_KEEPIDLE, 10);
      set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
      set(IPPROTO_TCP, TCP_KEEPCNT, 3);
    }
    sockets_[static_cast<std::size_t>(rank)] = std::move(socket);
    offsets_[static_cast<std::size_t>(rank)] = peer(rank).host == host_ ? 0 : clock_offset_ns;
  }

  /// A byte to and from everybody, sent by those that have all their connections.
  void agree_to_begin() {
    std::vector<bool> ready(sockets_.size(), false);
    ready[static_cast<std::size_t>(world_.rank)] = true;
    std::vector<std::uint8_t> bytes(sockets_.size(), 0);
    std::optional<int> gone;
    int unsent = world_.size - 1;
    static constexpr std::uint8_t kReady = 'R';
    for (std::size_t i = 0; i < sockets_.size(); ++i) {
      if (ready[i]) continue;
      const auto note = [&, i](const asio::error_code& error) {
        if (error) gone = static_cast<int>(i);
      };
      asio::async_write(*sockets_[i], asio::buffer(&kReady, 1), [&, note](const asio::error_code& error, std::size_t) {
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
      if (rank != world_.rank && !sockets_[static_cast<std::size_t>(rank)]) return rank;
    return std::nullopt;
  }
  std::string what_failed(int rank) {
    static constexpr const char* kFirewall = "; is there a firewall between the hosts? All ports must be open";
    const bool far = peer(rank).host != host_;
    if (rank > world_.rank)
      return "has started but does not connect" + (far ? str(" to this one at ", listens_at_, kFirewall) : "");
    std::string tried;
    for (const auto& [place, result] : peer(rank).tried)
      tried += str(tried.empty() ? "" : ", ", place, " (", result, ")");
    return str("has started but cannot be reached at ", tried, far ? kFirewall : "");
  }
  CommError failure(int rank, const std::string& what) const {
    return {rank, "rendezvous", str("rank ", world_.rank, ": rank ", rank, " ", what)};
  }
  Peer& peer(int rank) { return peers_[static_cast<std::size_t>(rank)]; }

  const World& world_;
  Rendezvous& rendezvous_;
  const int epoch_;
  const Rendezvous::Clock::time_point deadline_;
  const std::string host_;
  const std::string token_;
  std::vector<Peer> peers_;
  asio::io_context io_{1};  // its own: what is left to do on it ends with this object
  Unix::acceptor unix_{io_};
  tcp::acceptor tcp_{io_};
  std::string listens_at_;
  std::vector<std::optional<Socket>> sockets_;
  std::vector<std::int64_t> offsets_;
};

}  // namespace

std::vector<Connection> connect_mesh(asio::io_context& io, const World& world, Rendezvous& rendezvous, int epoch,
                                     Rendezvous::Clock::time_point deadline, Route route) {
  return MeshBuilder(world, rendezvous, epoch, deadline, route).build(io);
}

}  // namespace dualpipe::detail
