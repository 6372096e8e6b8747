#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

/// libFuzzer's entry point: calls read().
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace dualpipe::fuzz {

/// What a program fuzzes; each target defines it. Throws where a promise is broken, which ends the fuzzer and fails the
/// replay.
void read(std::string_view text);

inline void require(bool kept, const std::string& promise) {
  if (!kept) throw std::logic_error("broken promise: " + promise);
}

/// What a refusal may look like: one short paragraph that a terminal shows as it is, however long or binary the input
/// was.
inline void require_readable(std::string_view message) {
  constexpr std::size_t longest = 2000;
  require(!message.empty() && message.size() < longest, "a message has a reasonable length");
  for (const char c : message) {
    const auto byte = static_cast<unsigned char>(c);
    require(byte >= 0x20 || c == '\n', "a message has no control characters: " + std::string(message));
  }
}

}  // namespace dualpipe::fuzz
