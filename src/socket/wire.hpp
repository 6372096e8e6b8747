#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "contact/protocol.hpp"
#include "dualpipe/detail/comm/activity.hpp"
#include "dualpipe/detail/comm/message.hpp"
#include "socket/commit.hpp"

// The bytes on a connection between two ranks: frames of a prefix, a head, and for messages the bytes of the tensors.
// Numbers are in the machine's byte order; the magic number rejects a peer with another one.
namespace dualpipe::detail::wire {

/// The bytes are not what a rank of this version sends.
class Malformed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Kind : std::uint32_t {
  message = 1,
  vote = 2,
  failure = 3,  ///< the reason, and a word about the ends of steps
  goodbye = 4,
  beat = 5,      ///< the sender lives
  question = 6,  ///< what does the receiver do?
  answer = 7,
};

struct Prefix {
  std::uint32_t magic = static_cast<std::uint32_t>(protocol_magic);
  Kind kind = Kind::message;
  std::uint64_t head_bytes = 0;
  std::uint64_t payload_bytes = 0;
};

struct Failure {
  int origin = -1;
  std::string reason;
  Word word;
};

struct Goodbye {
  Word word;
  bool unwound = false;  ///< by an exception
};

/// Prefix and head of a frame, ready to be sent.
std::string message_frame(const Header& header, std::uint64_t payload_bytes);
std::string vote_frame(const Vote& vote);
std::string failure_frame(const Failure& failure);
std::string goodbye_frame(const Goodbye& goodbye);
std::string beat_frame();
std::string question_frame();
std::string answer_frame(const RankActivity& activity);

/// These throw Malformed.
Prefix read_prefix(std::string_view bytes);  ///< of sizeof(Prefix) bytes
Header read_header(std::string_view head);
Vote read_vote(std::string_view head);
Failure read_failure(std::string_view head);
Goodbye read_goodbye(std::string_view head);
RankActivity read_answer(std::string_view head);
/// Fresh memory for the tensors that `header` announces. @throws Malformed  they do not have `payload_bytes` in all.
Tensors allocate(const Header& header, std::uint64_t payload_bytes);

std::uint64_t payload_bytes(const Tensors& tensors);

}  // namespace dualpipe::detail::wire
