#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "dualpipe/detail/comm/message_communicator.hpp"

// What travels on a connection between two ranks: frames of a prefix, a head, and for messages the tensors' bytes one
// after the other. Numbers are in the byte order of the machine; a peer with another one is turned away by the magic.
namespace dualpipe::detail::wire {

/// Raised with every change of what is below; ranks built from different sources must not talk to each other.
constexpr std::uint32_t kVersion = 2;
constexpr std::uint64_t kMagic = 0x4455'414c'5049'5045;  // "DUALPIPE"

/// The bytes are not what a rank of this version sends.
class Malformed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Kind : std::uint32_t { message = 1, abort = 2, goodbye = 3 };

struct Prefix {
  std::uint32_t magic = static_cast<std::uint32_t>(kMagic);
  Kind kind = Kind::message;
  std::uint64_t head_bytes = 0;
  std::uint64_t payload_bytes = 0;
};

struct Abort {
  int origin = -1;
  std::string reason;
};

/// Prefix and head of a frame, ready to be sent.
std::string message_frame(const Header& header, std::uint64_t payload_bytes);
std::string abort_frame(int origin, std::string_view reason);
std::string goodbye_frame();

/// @throws Malformed  all of them
Prefix read_prefix(std::string_view bytes);  ///< of sizeof(Prefix) bytes
Header read_header(std::string_view head);
Abort read_abort(std::string_view head);
/// Fresh memory for what `header` announces. @throws Malformed also when that is not `payload_bytes` long.
Tensors allocate(const Header& header, std::uint64_t payload_bytes);

std::uint64_t payload_bytes(const Tensors& tensors);

}  // namespace dualpipe::detail::wire
