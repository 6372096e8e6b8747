#pragma once

#include <compare>
#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// What is computed: the whole backward B is the input part I followed by the weight part W.
enum class Pass : char { Forward = 'F', BackwardInput = 'I', BackwardWeight = 'W', Backward = 'B' };

/// One pass of one micro-batch through one stage; text form "2F0" (stage, pass, micro-batch).
struct Op {
  Pass pass = Pass::Forward;
  int stage = 0;
  int micro_batch = 0;
  auto operator<=>(const Op&) const = default;
};

/// What a rank does as one unit: an op, or a forward `op` whose run is interleaved with the backward `overlapped` (B or
/// I).
struct Step {
  Op op;
  std::optional<Op> overlapped;
  auto operator<=>(const Step&) const = default;
};

/// "2F0"
DUALPIPE_DECL std::string to_string(const Op& op);
/// "2F0", or "(0F7;7B3)OVERLAP_F_B" for a pair: the text form of torch.distributed.pipelining.
DUALPIPE_DECL std::string to_string(const Step& step);
/// The reverse of to_string. @throws InvalidArgument  that quotes the text and says what is wrong with it.
DUALPIPE_DECL Op parse_op(std::string_view text);
DUALPIPE_DECL Step parse_step(std::string_view text);

}  // namespace dualpipe

template <>
struct std::hash<dualpipe::Op> {
  std::size_t operator()(const dualpipe::Op& op) const noexcept {
    const auto place = (static_cast<std::size_t>(op.stage) << 32) ^ static_cast<std::size_t>(op.micro_batch);
    return std::hash<std::size_t>{}(place * 131 + static_cast<std::size_t>(op.pass));
  }
};

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/op.ipp"
#endif
