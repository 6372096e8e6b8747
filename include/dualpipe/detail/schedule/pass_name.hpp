#pragma once

#include "dualpipe/schedule/op.hpp"

namespace dualpipe::detail {

/// In messages, pictures and traces.
constexpr const char* pass_name(Pass pass) {
  switch (pass) {
    case Pass::Forward:
      return "forward";
    case Pass::BackwardInput:
      return "input backward";
    case Pass::BackwardWeight:
      return "weight backward";
    case Pass::Backward:
      return "backward";
  }
  return "?";
}

}  // namespace dualpipe::detail
