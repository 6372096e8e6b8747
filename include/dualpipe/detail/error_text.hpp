#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

namespace dualpipe::detail {

/// What an exception says, without the backtrace that LibTorch's own carry.
inline std::string message_of(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

}  // namespace dualpipe::detail
