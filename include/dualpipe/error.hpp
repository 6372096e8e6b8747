#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace dualpipe {

/// Root of everything this library throws.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The call itself is wrong: a value, a shape, a file, an environment variable. It changed nothing; the caller can
/// correct it and go on.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// A peer, a socket or a device failed. The communicator that threw, and its whole family, is unusable afterwards.
class CommError : public Error {
 public:
  /// @param origin_rank  the rank where it began (world numbering), -1 where unknown.
  /// @param operation    what was under way, as in "receive from 3".
  CommError(int origin_rank, std::string operation, const std::string& message)
      : Error(message), origin_rank_(origin_rank), operation_(std::move(operation)) {}
  int origin_rank() const noexcept { return origin_rank_; }
  const std::string& operation() const noexcept { return operation_; }

 private:
  int origin_rank_;
  std::string operation_;
};

namespace detail {

/// Everything streamed into one string.
template <class... Parts>
std::string str(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

}  // namespace detail
}  // namespace dualpipe

/// Throws InvalidArgument with the remaining arguments streamed together, unless `condition` holds.
#define DUALPIPE_CHECK(condition, ...)                                         \
  do {                                                                         \
    if (!(condition)) [[unlikely]]                                             \
      throw ::dualpipe::InvalidArgument(::dualpipe::detail::str(__VA_ARGS__)); \
  } while (false)
