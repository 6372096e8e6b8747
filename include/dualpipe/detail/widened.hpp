#pragma once

#include <c10/core/ScalarType.h>

namespace dualpipe::detail {

/// What numbers of a type are added up in: float32 for bfloat16 and float16, which have few digits, else the same type.
inline at::ScalarType widened(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf ? at::kFloat : type;
}

}  // namespace dualpipe::detail
