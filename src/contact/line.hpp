#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "contact/handshake.hpp"

namespace dualpipe::detail {

/// JSON values over a connection whose ends have made sure of each other: a length of four bytes and the text, each.
/// Used by the thread that runs the io_context of the socket.
class Line : public std::enable_shared_from_this<Line> {
 public:
  using Arrived = std::function<void(const nlohmann::json& message)>;
  /// `why` completes "rank 2 …". Not called after close().
  using Ended = std::function<void(const std::string& why)>;

  Line(StreamSocket socket, Arrived arrived, Ended ended);
  void start();
  void send(const nlohmann::json& message) { send(frame_of(message)); }
  /// What travels of a message: made once, it can be sent to many.
  using Frame = std::shared_ptr<const std::string>;
  static Frame frame_of(const nlohmann::json& message);
  void send(const Frame& frame);
  void close() noexcept;
  bool is_open() const { return socket_.is_open(); }
  /// When something has last come; counts from the beginning, or from listen_anew().
  std::chrono::steady_clock::time_point last_heard() const { return last_heard_; }
  void listen_anew() { last_heard_ = std::chrono::steady_clock::now(); }

 private:
  void read_length();
  void read_text();
  void write();
  void end(const std::string& why);

  StreamSocket socket_;
  Arrived arrived_;
  Ended ended_;
  std::uint32_t length_ = 0;
  std::string text_;
  std::deque<Frame> outgoing_;
  std::chrono::steady_clock::time_point last_heard_ = std::chrono::steady_clock::now();
};

}  // namespace dualpipe::detail
