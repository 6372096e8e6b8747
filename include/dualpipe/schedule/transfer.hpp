#pragma once

#include <compare>
#include <string>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/op.hpp"

namespace dualpipe {

/// When results leave a step. early: as soon as they exist: a B hands its input gradient on before its weight part,
/// that is at begin + (backward - weight), a pair both of its results at begin + (pair - weight); atomic: when the step
/// ends, as published. What stays on its rank is there at the end of the step either way.
enum class Publish { early, atomic };

/// What travels between two ranks: the output of F(stage, micro_batch) to stage + 1, or the input gradient that the
/// backward of (stage, micro_batch) hands to stage - 1. `stage` is the producer.
enum class Payload { activation, gradient };
struct Transfer {
  Payload payload = Payload::activation;
  int stage = 0;
  int micro_batch = 0;
  int from = 0;
  int to = 0;
  auto operator<=>(const Transfer&) const = default;
};

/// "2F5 from rank 2 to rank 3"; an input gradient is named as the result of I.
DUALPIPE_DECL std::string to_string(const Transfer& transfer);

namespace detail {

/// The pass that a result is named after; a B makes an input gradient too.
constexpr Pass producer_of(Payload payload) {
  return payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
}

}  // namespace detail
}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/transfer.ipp"
#endif
