#pragma once

#include <functional>
#include <string>

#include "dualpipe/error.hpp"

namespace dualpipe::test {

/// The text of the InvalidArgument that `call` throws.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no InvalidArgument";
}

}  // namespace dualpipe::test
