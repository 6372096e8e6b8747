#pragma once

#include <asio/io_context.hpp>
#include <atomic>
#include <memory>
#include <string>

#include "contact/handshake.hpp"

namespace dualpipe::detail {

/// Of an encrypted connection: whether it has ended by another error than the end of the process at its other end. Null
/// otherwise.
using Broken = std::shared_ptr<const std::atomic<bool>>;

/// Encrypts connections with TLS 1.3, whose key is the secret of the job; nothing else than the secret is needed, and
/// nobody without it can take part or listen. One thread moves and encrypts the bytes: what is wrapped looks like a Unix
/// domain socket to this process and costs two copies more.
class Encryption {
 public:
  /// @param secret  not empty.
  explicit Encryption(std::string secret);
  /// Call when the ends of this process are closed. Sends what was written to them, for half a second at most.
  ~Encryption();
  Encryption(const Encryption&) = delete;
  Encryption& operator=(const Encryption&) = delete;

  /// @param socket  a TCP connection to a process that wraps its end as well; becomes this process's end, which is
  ///                closed where the other end has not the secret.
  /// @param listens nothing is written to it before something has been read.
  Broken wrap(asio::io_context& io, StreamSocket& socket, bool listens);
  /// Whether all that was written has been handed to the kernel. Any thread.
  bool flushed() const;

 private:
  class Pump;
  class Pumps;
  std::unique_ptr<Pumps> pumps_;
};

}  // namespace dualpipe::detail
