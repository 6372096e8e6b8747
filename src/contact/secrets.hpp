#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

// What ranks prove to each other with. All of it is OpenSSL's.
namespace dualpipe::detail {

using Bytes32 = std::array<std::uint8_t, 32>;

/// @throws CommError  the system has no random numbers.
Bytes32 random_bytes();

/// HMAC-SHA256 (RFC 2104) of the parts, each preceded by its length so that no two lists of parts are the same bytes.
Bytes32 authentication_code(std::string_view key, std::initializer_list<std::string_view> parts);

/// Takes the same time wherever they differ.
bool equal_codes(const Bytes32& a, const Bytes32& b);

std::string_view as_text(const Bytes32& bytes);
std::string hexadecimal(const Bytes32& bytes);
/// @throws std::invalid_argument  not 64 hexadecimal digits.
Bytes32 from_hexadecimal(std::string_view text);

}  // namespace dualpipe::detail
