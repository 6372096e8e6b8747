#include "contact/contact.hpp"

#include <netinet/tcp.h>

#include <algorithm>
#include <array>
#include <asio/basic_socket_acceptor.hpp>
#include <asio/ip/v6_only.hpp>
#include <asio/local/stream_protocol.hpp>
#include <cerrno>
#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;
using asio::ip::tcp;
using Stream = asio::generic::stream_protocol;

/// Longest time until a place answers at all.
constexpr auto connect_limit = 5s;
constexpr auto pause_between_calls = 20ms;
constexpr auto pause_without_room = 100ms;
/// Strangers beside the ranks that a listener listens to at a time.
constexpr std::size_t tolerated_strangers = 64;

/// Errors of accept() that say something about one connection, not about this process (accept(2), "Error handling").
bool concerns_one_connection(const asio::error_code& error) {
  constexpr std::array ours = {ECONNABORTED, ECONNRESET, EPROTO,      ENETDOWN, ENOPROTOOPT, EHOSTDOWN, ENONET,
                               EHOSTUNREACH, EOPNOTSUPP, ENETUNREACH, EPERM,    EAGAIN,      EINTR};
  return std::find(ours.begin(), ours.end(), error.value()) != ours.end();
}

/// Whether what has come begins TLS (RFC 8446, section 5.1: the type of a handshake record).
bool begins_encryption(StreamSocket& socket) {
  constexpr char handshake_record = 22;
  char first = 0;
  return ::recv(socket.native_handle(), &first, 1, MSG_PEEK | MSG_DONTWAIT) == 1 && first == handshake_record;
}

bool crosses_hosts(const StreamSocket& socket) { return socket.local_endpoint().protocol().family() != AF_UNIX; }

tcp::endpoint as_tcp(const Stream::endpoint& endpoint) {
  tcp::endpoint result;
  result.resize(endpoint.size());
  std::copy_n(reinterpret_cast<const char*>(endpoint.data()), endpoint.size(), reinterpret_cast<char*>(result.data()));
  return result;
}

asio::ip::address address_of(const Stream::endpoint& endpoint) {
  const asio::ip::address address = as_tcp(endpoint).address();
  return address.is_v6() && address.to_v6().is_v4_mapped()
             ? asio::ip::make_address_v4(asio::ip::v4_mapped, address.to_v6())
             : address;
}

/// No TCP_USER_TIMEOUT: Linux applies it to a peer that lives and takes nothing, as one that is suspended does.
void set_tcp_options(StreamSocket& socket) {
  socket.set_option(tcp::no_delay(true));
  const auto set = [fd = socket.native_handle()](int level, int option, int value) {
    ::setsockopt(fd, level, option, &value, sizeof value);
  };
  // Where nobody looks for silent ranks, an idle connection notices within half a minute that a host is gone.
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 10);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
}

/// A socket that programs which this process starts do not inherit: they would hide this rank's death.
int new_socket(const Stream& protocol) {
  const int fd = ::socket(protocol.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, protocol.protocol());
  if (fd < 0) throw asio::system_error(errno, asio::error::get_system_category(), "cannot make a socket");
  return fd;
}

/// Starts the handshake on a connection that has just come about.
std::shared_ptr<Handshake> shake_hands(asio::io_context& io, StreamSocket socket, Handshake::Side side,
                                       const Introduction& introduction,
                                       std::function<void(Contact, const std::string& problem)> done) {
  Ends ends;
  const auto broken = std::make_shared<Broken>();
  std::function<void(StreamSocket&)> spoken;
  if (crosses_hosts(socket)) {
    set_tcp_options(socket);
    ends = {address_of(socket.local_endpoint()), address_of(socket.remote_endpoint())};
    const bool listens = side == Handshake::Side::listener;
    const auto encrypt = [&io, broken, listens, encryption = introduction.encryption](StreamSocket& plain) {
      *broken = encryption->wrap(io, plain, listens);
    };
    if (introduction.encryption != nullptr && !introduction.encryption_is_optional)
      encrypt(socket);
    else if (introduction.encryption != nullptr)
      spoken = [encrypt](StreamSocket& plain) {
        if (begins_encryption(plain)) encrypt(plain);
      };
  }
  auto handshake = std::make_shared<Handshake>(
      io, std::move(socket), side, introduction.own, introduction.key,
      [ends, check = introduction.check](const Greeting& theirs) { return check(theirs, ends); },
      [ends, broken, done = std::move(done)](Handshake& over, const std::string& problem) {
        done({.rank = over.theirs().rank,
              .size = over.theirs().size,
              .meeting = over.theirs().meeting,
              .socket = over.take(),
              .clock_offset_ns = ends.are_far() ? over.clock_offset_ns() : 0,
              .ends = ends,
              .broken = *broken},
             problem);
      });
  handshake->start(spoken);
  return handshake;
}

}  // namespace

std::string random_unix_name() { return "dualpipe." + hexadecimal(random_bytes()); }

asio::generic::stream_protocol::endpoint unix_endpoint(const std::string& name) {
  return asio::local::stream_protocol::endpoint(std::string(1, '\0') + name);
}

// ---- listening

struct Listener::Door {
  explicit Door(asio::io_context& io) : acceptor(io), pause(io) {}
  asio::basic_socket_acceptor<Stream> acceptor;
  asio::steady_timer pause;
};

Listener::Listener(asio::io_context& io, Introduction introduction, int num_callers, Admitted admitted)
    : io_(io),
      introduction_(std::move(introduction)),
      limit_(tolerated_strangers + num_callers),
      admitted_(std::move(admitted)) {}

void Listener::open(const Stream::endpoint& endpoint) {
  auto door = std::make_shared<Door>(io_);
  const Stream protocol(endpoint.protocol());
  door->acceptor.assign(protocol, new_socket(protocol));
  if (protocol.family() != AF_UNIX) door->acceptor.set_option(tcp::acceptor::reuse_address(true));
  if (protocol.family() == AF_INET6) {
    // An unspecified address takes both families, another one is of one family anyway.
    asio::error_code ignored;
    door->acceptor.set_option(asio::ip::v6_only(false), ignored);
  }
  door->acceptor.bind(endpoint);
  door->acceptor.listen();
  doors_.push_back(door);
  accept(door);
}

void Listener::listen_here(const std::string& name) { open(unix_endpoint(name)); }

std::uint16_t Listener::listen_at(const tcp::endpoint& endpoint) {
  open(endpoint);
  return as_tcp(doors_.back()->acceptor.local_endpoint()).port();
}

void Listener::close() noexcept {
  asio::error_code ignored;
  for (const auto& door : doors_) door->acceptor.close(ignored);
  doors_.clear();
  for (const auto& handshake : std::exchange(handshakes_, {}))
    if (!handshake->is_over()) handshake->give_up("this rank listens no more");
}

void Listener::accept(const std::shared_ptr<Door>& door) {
  door->acceptor.async_wait(asio::socket_base::wait_read, [this, door](const asio::error_code& error) {
    if (error || !door->acceptor.is_open()) return;  // closed, perhaps with this object
    if (accept_one(*door)) return accept(door);
    door->pause.expires_after(pause_without_room);
    door->pause.async_wait([this, door](const asio::error_code& cancelled) {
      if (!cancelled && door->acceptor.is_open()) accept(door);
    });
  });
}

bool Listener::accept_one(Door& door) {
  const int fd = ::accept4(door.acceptor.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  const asio::error_code error(errno, asio::error::get_system_category());
  if (fd >= 0) meet(StreamSocket(io_, door.acceptor.local_endpoint().protocol(), fd));
  if (fd >= 0 || concerns_one_connection(error)) return true;
  // Strangers may hold the descriptors that this process has left.
  forget_ended();
  if (handshakes_.empty()) throw asio::system_error(error, "cannot accept connections");
  handshakes_.front()->give_up("no more descriptors or memory");
  return false;
}

bool Listener::is_being_called() const {
  return std::any_of(handshakes_.begin(), handshakes_.end(),
                     [](const auto& handshake) { return !handshake->is_over(); });
}

void Listener::forget_ended() {
  handshakes_.remove_if([](const auto& handshake) { return handshake->is_over(); });
}

void Listener::meet(StreamSocket socket) {
  forget_ended();
  // The oldest has had its time: a rank needs a moment only.
  if (handshakes_.size() >= limit_) handshakes_.front()->give_up("too many connections at once");
  try {
    handshakes_.push_back(shake_hands(io_, std::move(socket), Handshake::Side::listener, introduction_,
                                      [this](Contact contact, const std::string& problem) {
                                        if (problem.empty()) admitted_(std::move(contact));
                                      }));
  } catch (const asio::system_error&) {
    // The caller has gone already.
  }
}

// ---- calling

Caller::Caller(asio::io_context& io, Introduction introduction, Places places, Connected connected)
    : io_(io),
      introduction_(std::move(introduction)),
      places_(std::move(places)),
      connected_(std::move(connected)),
      timer_(io) {}

void Caller::start() { call_next(); }

void Caller::close() noexcept {
  closed_ = true;
  timer_.cancel();
  asio::error_code ignored;
  if (connecting_) connecting_->close(ignored);
  if (handshake_ && !handshake_->is_over()) handshake_->give_up("this rank calls no more");
}

std::string Caller::outcomes() const {
  std::string text;
  for (const auto& [place, outcome] : outcomes_) text += str(text.empty() ? "" : ", ", place, " (", outcome, ")");
  return text;
}

bool Caller::lacks_answers() const {
  return std::any_of(outcomes_.begin(), outcomes_.end(), [](const auto& each) { return each.second == no_answer; });
}

void Caller::call_next() {
  if (left_.empty()) {
    left_ = places_();
    std::reverse(left_.begin(), left_.end());
    if (left_.empty()) return call_again("an address", "it has none");
  }
  const Place place = std::move(left_.back());
  left_.pop_back();
  if (!place.endpoint) return call_again(place.name, place.problem);
  connect(place);
}

void Caller::connect(const Place& place) {
  outcomes_.emplace(place.name, no_answer);
  const Stream protocol(place.endpoint->protocol());
  try {
    connecting_ = std::make_shared<StreamSocket>(io_, protocol, new_socket(protocol));
  } catch (const asio::system_error& error) {
    // A kernel without IPv6: another place may do.
    if (error.code() != asio::error::address_family_not_supported) throw;
    return call_again(place.name, error.what());
  }
  timer_.expires_after(connect_limit);
  timer_.async_wait([socket = std::weak_ptr(connecting_)](const asio::error_code& error) {
    if (const auto late = socket.lock(); !error && late) late->close();
  });
  connecting_->async_connect(*place.endpoint, [self = shared_from_this(), socket = connecting_,
                                               place](const asio::error_code& error) {
    if (self->closed_) return;
    self->timer_.cancel();
    self->connecting_.reset();
    if (error)
      return self->call_again(place.name, error == asio::error::operation_aborted ? no_answer : error.message());
    const auto done = [self, name = place.name](Contact contact, const std::string& problem) {
      if (self->closed_) return;
      if (!problem.empty()) return self->call_again(name, problem);
      self->closed_ = true;
      std::exchange(self->connected_, {})(std::move(contact));
    };
    try {
      self->handshake_ = shake_hands(self->io_, std::move(*socket), Handshake::Side::caller, self->introduction_, done);
    } catch (const asio::system_error& gone) {
      self->call_again(place.name, gone.what());
    }
  });
}

void Caller::call_again(const std::string& place, const std::string& problem) {
  outcomes_[place] = problem;
  timer_.expires_after(left_.empty() ? pause_between_calls : 0ms);
  timer_.async_wait([self = shared_from_this()](const asio::error_code& error) {
    if (!error && !self->closed_) self->call_next();
  });
}

}  // namespace dualpipe::detail
