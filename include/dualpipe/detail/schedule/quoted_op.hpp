#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace dualpipe::detail {

/// For messages: in quotes, unprintable bytes as \xNN, long text cut.
inline std::string quoted_op(std::string_view text) {
  constexpr std::size_t shown = 48;
  constexpr std::string_view hex = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text.substr(0, shown)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += "\\x";
      out += hex[byte >> 4];
      out += hex[byte & 15];
    }
  }
  out += text.size() > shown ? "...\"" : "\"";
  return out;
}

}  // namespace dualpipe::detail
