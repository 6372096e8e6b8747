#include "contact/encryption.hpp"

#include <linux/sockios.h>
#include <openssl/ssl.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <asio/executor_work_guard.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/post.hpp>
#include <asio/ssl/context.hpp>
#include <asio/ssl/error.hpp>
#include <asio/ssl/stream.hpp>
#include <asio/steady_timer.hpp>
#include <asio/write.hpp>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <list>
#include <mutex>
#include <thread>
#include <utility>

#include "contact/blocked_signals.hpp"
#include "dualpipe/detail/comm/stopwatch.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace {

namespace ssl = asio::ssl;
using Local = asio::local::stream_protocol::socket;

constexpr auto tls_handshake_limit = std::chrono::seconds(5);
constexpr auto farewell_limit = std::chrono::milliseconds(500);
constexpr const char* psk_identity = "dualpipe";

/// Where OpenSSL keeps the key of a context for us.
int key_index() {
  static const int index = SSL_CTX_get_ex_new_index(0, nullptr, nullptr, nullptr, nullptr);
  return index;
}

unsigned int copy_key(SSL* connection, unsigned char* to, unsigned int room) {
  const auto* key = static_cast<const Bytes32*>(SSL_CTX_get_ex_data(SSL_get_SSL_CTX(connection), key_index()));
  if (key == nullptr || room < key->size()) return 0;
  std::copy(key->begin(), key->end(), to);
  return static_cast<unsigned int>(key->size());
}

unsigned int key_of_server(SSL* connection, const char* identity, unsigned char* key, unsigned int room) {
  return std::string_view(identity) == psk_identity ? copy_key(connection, key, room) : 0;
}

unsigned int key_of_client(SSL* connection, const char* /*hint*/, char* identity, unsigned int identity_room,
                           unsigned char* key, unsigned int room) {
  const std::string_view name = psk_identity;
  if (identity_room <= name.size()) return 0;
  *std::copy(name.begin(), name.end(), identity) = '\0';
  return copy_key(connection, key, room);
}

}  // namespace

/// Moves the bytes of one connection between its two ends.
class Encryption::Pump : public std::enable_shared_from_this<Pump> {
 public:
  Pump(asio::io_context& io, ssl::context& context, StreamSocket far, Local near)
      : far_(std::move(far), context), near_(std::move(near)), timer_(io) {}

  void start(bool listens) {
    timer_.expires_after(tls_handshake_limit);
    timer_.async_wait([weak = weak_from_this()](const asio::error_code& error) {
      if (const auto self = weak.lock(); !error && self) self->close();
    });
    near_.non_blocking(true);
    // A listener's end that becomes readable before is closed: it has given the stranger up.
    if (listens) {
      near_.async_wait(Local::wait_read, [self = shared_from_this()](const asio::error_code& error) {
        if (!error && !self->is_secure_) self->close();
      });
    }
    far_.async_handshake(listens ? ssl::stream_base::server : ssl::stream_base::client,
                         [self = shared_from_this()](const asio::error_code& error) {
                           self->timer_.cancel();
                           if (error) return self->close();
                           self->is_secure_ = true;
                           self->send_more();
                           self->receive_more();
                         });
  }

  void close() {
    asio::error_code ignored;
    far_.lowest_layer().close(ignored);
    near_.close(ignored);
  }

  Broken broken() const { return broken_; }

  bool flushed() const {
    int unread = 0, unacknowledged = 0;
    if (::ioctl(near_handle_, FIONREAD, &unread) == 0 && unread > 0) return false;
    if (sending_) return false;
    return ::ioctl(far_handle_, SIOCOUTQ, &unacknowledged) != 0 || unacknowledged == 0;
  }

 private:
  void send_more() {
    near_.async_wait(Local::wait_read, [self = shared_from_this()](const asio::error_code& error) {
      if (error) return self->close();
      self->sending_ = true;  // before the bytes leave the socket
      asio::error_code problem;
      const std::size_t size = self->near_.read_some(asio::buffer(self->outgoing_), problem);
      if (problem == asio::error::would_block || problem == asio::error::try_again) {
        // Readiness may be announced once more for bytes that were read before.
        self->sending_ = false;
        return self->send_more();
      }
      if (problem) return self->close();
      const auto sent = [self](const asio::error_code&, std::size_t) {
        self->sending_ = false;
        self->send_more();
      };
      if (self->far_has_ended_)
        sent({}, size);  // nobody takes it
      else
        asio::async_write(self->far_, asio::buffer(self->outgoing_, size), sent);
    });
  }

  void receive_more() {
    const auto received = [self = shared_from_this()](const asio::error_code& error, std::size_t size) {
      if (error) return self->far_ended(error);
      asio::async_write(self->near_, asio::buffer(self->incoming_, size),
                        [self](const asio::error_code& failed, std::size_t) {
                          if (!failed) self->receive_more();
                        });
    };
    far_.async_read_some(asio::buffer(incoming_), received);
  }

  /// This process's end stays open for what it still writes: a close would overtake what has come.
  void far_ended(const asio::error_code& error) {
    if (!closed_by_peer(error) && error != ssl::error::stream_truncated) *broken_ = true;
    far_has_ended_ = true;
    asio::error_code ignored;
    near_.shutdown(Local::shutdown_send, ignored);
  }

  ssl::stream<StreamSocket> far_;
  Local near_;
  const int far_handle_ = far_.lowest_layer().native_handle(), near_handle_ = near_.native_handle();
  asio::steady_timer timer_;
  std::array<char, 1 << 16> outgoing_, incoming_;
  const std::shared_ptr<std::atomic<bool>> broken_ = std::make_shared<std::atomic<bool>>(false);
  std::atomic<bool> sending_{false};
  bool is_secure_ = false;
  bool far_has_ended_ = false;
};

class Encryption::Pumps {
 public:
  explicit Pumps(const std::string& secret) : key_(authentication_code(secret, {"TLS"})) {
    for (ssl::context* const side : {&listening_, &calling_}) {
      SSL_CTX* const context = side->native_handle();
      SSL_CTX_set_ex_data(context, key_index(), &key_);
      // A pre-shared key goes with the hash SHA-256 (RFC 8446, section 4.2.11), combined with an ephemeral exchange.
      SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256");
      SSL_CTX_set_num_tickets(context, 0);
    }
    SSL_CTX_set_psk_server_callback(listening_.native_handle(), key_of_server);
    SSL_CTX_set_psk_client_callback(calling_.native_handle(), key_of_client);
    calling_.set_verify_mode(ssl::verify_peer);  // no certificate instead of the key
    const BlockedSignals blocked;
    thread_ = std::thread([this] {
      pthread_setname_np(pthread_self(), "dualpipe-tls");
      const auto work = asio::make_work_guard(io_);
      while (!io_.stopped()) {
        try {
          io_.run();
        } catch (const std::exception&) {  // no memory: the ranks find their connections closed
          for_all([](Pump& pump) { pump.close(); });
        }
      }
    });
  }

  /// The ends of this process are closed: what was written to them is sent, then the pumps end.
  ~Pumps() {
    Stopwatch watch;
    while (!all_ended() && watch.elapsed() < farewell_limit) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    io_.stop();
    thread_.join();
  }
  Pumps(const Pumps&) = delete;
  Pumps& operator=(const Pumps&) = delete;

  Broken wrap(asio::io_context& io, StreamSocket& socket, bool listens) {
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0)
      throw asio::system_error(errno, asio::error::get_system_category(), "cannot make a pair of sockets");
    Local near(io_, asio::local::stream_protocol(), ends[0]);
    StreamSocket own(io, asio::generic::stream_protocol(asio::local::stream_protocol()), ends[1]);
    const auto protocol = socket.local_endpoint().protocol();
    const auto pump = std::make_shared<Pump>(io_, listens ? listening_ : calling_,
                                             StreamSocket(io_, protocol, socket.release()), std::move(near));
    {
      const std::lock_guard lock(mutex_);
      all_.remove_if([](const auto& weak) { return weak.expired(); });
      all_.push_back(pump);
    }
    asio::post(io_, [pump, listens] { pump->start(listens); });
    socket = std::move(own);
    return pump->broken();
  }

  bool flushed() const {
    bool all = true;
    for_all([&](const Pump& pump) { all = all && pump.flushed(); });
    return all;
  }

 private:
  bool all_ended() const {
    const std::lock_guard lock(mutex_);
    return std::all_of(all_.begin(), all_.end(), [](const auto& weak) { return weak.expired(); });
  }
  template <class Action>
  void for_all(const Action& action) const {
    const std::lock_guard lock(mutex_);
    for (const auto& weak : all_)
      if (const auto pump = weak.lock()) action(*pump);
  }

  Bytes32 key_;
  ssl::context listening_{ssl::context::tlsv13_server}, calling_{ssl::context::tlsv13_client};
  mutable std::mutex mutex_;  // guards all_
  std::list<std::weak_ptr<Pump>> all_;
  asio::io_context io_{1};
  std::thread thread_;
};

Encryption::Encryption(std::string secret) : pumps_(std::make_unique<Pumps>(secret)) {}
Encryption::~Encryption() = default;
Broken Encryption::wrap(asio::io_context& io, StreamSocket& socket, bool listens) {
  return pumps_->wrap(io, socket, listens);
}
bool Encryption::flushed() const { return pumps_->flushed(); }

}  // namespace dualpipe::detail
