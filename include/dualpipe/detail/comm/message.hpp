#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/comm/message_tensors.hpp"

// What travels between two ranks, and one end of it under way.
namespace dualpipe::detail {

/// std::chrono::steady_clock, whose zero all processes of one host share.
std::int64_t now_ns() noexcept;

/// Collectives and transfers of one group do not match each other: they travel in separate lanes.
enum class Channel : std::uint8_t { transfer, collective };

/// What both ends of a message must agree on, and when it was sent. Travels before the tensors.
struct Header {
  std::int64_t group = 0;
  Channel channel = Channel::transfer;
  std::int32_t epoch = 0;
  std::uint64_t sequence =
      0;  ///< transfer: the k-th between these two ranks in this direction; collective: the k-th of the group
  std::int64_t issued_ns = 0;  ///< when the sender came to it
  std::string operation;       ///< "send", "all_reduce(sum)", "broadcast from rank 2"
  Signature signature;
  bool tensors_follow = true;  ///< false: they travel by another way, the message only announces them
};

struct Message {
  Header header;
  std::shared_ptr<MessageTensors> parcel;  ///< never null; a message without tensors has an empty one
  /// Optional; run once when a receive has met the message, on the thread that found out, without locks held.
  std::function<void()> accepted;
};

/// One end of a message under way. Made by Transport and guarded by its mutex until `done`, constant afterwards.
struct Request {
  enum class Kind : std::uint8_t { send, receive };
  Kind kind = Kind::send;
  int peer = 0;
  Header header;               ///< send: what was sent; receive: what is expected, and when it was posted
  bool any_signature = false;  ///< receive: header.signature is not compared
  std::string advice;          ///< receive: for the error where another signature comes
  Message message;             ///< send: its parcel; receive: what came
  bool done = false;
  std::int64_t completed_ns = 0;

  /// "receive from rank 2", "all_reduce(sum)"
  std::string operation() const;
  /// "receive from rank 2 (message 17 of group 0)"
  std::string describe() const;
  Request without_message() const;
  /// Stands for a collective, to name it.
  static Request collective(const Header& header);
};

}  // namespace dualpipe::detail
