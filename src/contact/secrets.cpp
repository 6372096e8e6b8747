#include "contact/secrets.hpp"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>

#include <charconv>
#include <stdexcept>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

Bytes32 random_bytes() {
  Bytes32 bytes;
  if (RAND_bytes(bytes.data(), static_cast<int>(bytes.size())) != 1)
    throw CommError(-1, "rendezvous", "OpenSSL has no random numbers (RAND_bytes failed)");
  return bytes;
}

Bytes32 authentication_code(std::string_view key, std::initializer_list<std::string_view> parts) {
  std::string all;
  for (const std::string_view part : parts) {
    const std::uint64_t size = part.size();
    all.append(reinterpret_cast<const char*>(&size), sizeof size);
    all += part;
  }
  Bytes32 code;
  unsigned int size = 0;
  const unsigned char* made = HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()),
                                   reinterpret_cast<const unsigned char*>(all.data()), all.size(), code.data(), &size);
  if (made == nullptr || size != code.size())
    throw CommError(-1, "rendezvous", "OpenSSL cannot compute HMAC-SHA256; does its configuration forbid it?");
  return code;
}

bool equal_codes(const Bytes32& a, const Bytes32& b) { return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0; }

std::string_view as_text(const Bytes32& bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

std::string hexadecimal(const Bytes32& bytes) {
  std::string text;
  for (const std::uint8_t byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

Bytes32 from_hexadecimal(std::string_view text) {
  Bytes32 bytes;
  if (text.size() != 2 * bytes.size()) throw std::invalid_argument(str(text.size(), " hexadecimal digits"));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const char* const first = text.data() + 2 * i;
    const auto [end, error] = std::from_chars(first, first + 2, bytes[i], 16);
    if (error != std::errc{} || end != first + 2) throw std::invalid_argument("no hexadecimal digits");
  }
  return bytes;
}

}  // namespace dualpipe::detail
