#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/comm/message_tensors.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/host.hpp"

// What travels between two ranks, and one end of it.
namespace dualpipe::detail {

inline double seconds_of(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

/// Messages of different channels never match.
enum class Channel : std::uint8_t { transfer, collective };

/// What both ends of a message must agree on, and when it was sent. Travels ahead of the tensors.
struct Header {
  std::int64_t group = 0;
  Channel channel = Channel::transfer;
  std::int32_t epoch = 0;
  /// Transfer: counts the messages between these two ranks in this direction. Collective: counts those of the group.
  std::uint64_t sequence = 0;
  std::int64_t issued_ns = 0;  ///< when the sender called
  std::string operation;       ///< "send", "all_reduce(sum)", "broadcast from rank 2"
  Signature signature;
  bool tensors_follow = true;  ///< false: another network carries the tensors, this message only announces them
};

/// Makes the headers of one group, and counts as both ends of a message must.
class GroupHeaders {
 public:
  /// @param tensors_follow  as in Header.
  DUALPIPE_DECL GroupHeaders(std::int64_t group, std::int32_t epoch, std::size_t num_ranks, bool tensors_follow = true);
  std::int64_t group() const noexcept { return group_; }
  DUALPIPE_DECL Header next_send(std::size_t peer, Signature signature);
  DUALPIPE_DECL Header next_receive(std::size_t peer, Signature expected);
  DUALPIPE_DECL Header next_collective(std::string operation, Signature signature = {});
  /// For a call that sends no message: counts nothing.
  DUALPIPE_DECL Header local(std::string operation) const;

 private:
  DUALPIPE_DECL Header make(Channel channel, std::string operation, std::uint64_t sequence, Signature signature) const;

  std::int64_t group_;
  std::int32_t epoch_;
  bool tensors_follow_;
  std::vector<std::uint64_t> sends_;     // to each rank so far
  std::vector<std::uint64_t> receives_;  // from each rank so far
  std::uint64_t collectives_ = 0;
};

struct Message {
  Header header;
  std::shared_ptr<MessageTensors> tensors;  ///< never null; empty for a message without tensors
  /// May be null. Called once when a receive has matched the message, on the thread that matched them, without locks.
  std::function<void()> accepted;
};

/// One end of a message. Transport makes it and guards it by its mutex until `done`; constant afterwards.
struct Request {
  enum class Kind : std::uint8_t { send, receive };
  Kind kind = Kind::send;
  int peer = 0;
  Header header;               ///< send: what was sent; receive: what is expected, and when it was posted
  bool any_signature = false;  ///< receive: header.signature is not compared
  std::string advice;          ///< receive: ends the error about another signature
  Message message;             ///< send: its tensors; receive: what arrived
  bool done = false;
  std::int64_t completed_ns = 0;

  /// "receive from rank 2", "all_reduce(sum)"
  DUALPIPE_DECL std::string operation() const;
  /// "receive from rank 2 (message 17 of group 0)"
  DUALPIPE_DECL std::string describe() const;
  DUALPIPE_DECL Request without_message() const;
  /// Names a collective in errors.
  DUALPIPE_DECL static Request collective(const Header& header);
};
using Requests = std::vector<std::shared_ptr<Request>>;

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/comm/message.ipp"
#endif
