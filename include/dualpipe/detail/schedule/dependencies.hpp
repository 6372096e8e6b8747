#pragma once

#include <compare>
#include <optional>

#include "dualpipe/schedule/op.hpp"
#include "dualpipe/schedule/transfer.hpp"

namespace dualpipe::detail {

// Which op waits for which. The rules are the same for all schedules, since one micro-batch runs one stage on one rank:
//   F(s) after F(s-1)                     takes the activation of the stage before
//   B(s), I(s) after F(s), B or I(s+1)    takes the input gradient of the stage behind
//   W(s) after I(s)
// Only activations and input gradients travel between stages; the rest is the order on one rank.

/// B or I: what computes an input gradient.
constexpr bool is_backward(Pass pass) { return pass == Pass::Backward || pass == Pass::BackwardInput; }

/// What a pass hands to another stage.
constexpr std::optional<Payload> payload_of(Pass pass) {
  if (pass == Pass::Forward) return Payload::activation;
  if (is_backward(pass)) return Payload::gradient;
  return std::nullopt;
}

/// The stage that takes what `stage` made. May lie outside of the model.
constexpr int receiver_stage(Payload payload, int stage) {
  return payload == Payload::activation ? stage + 1 : stage - 1;
}
/// The stage that makes what `stage` takes. May lie outside of the model.
constexpr int sender_stage(Payload payload, int stage) {
  return payload == Payload::activation ? stage - 1 : stage + 1;
}

/// The boundary between two stages that a result crosses: boundary b lies between the stages b and b + 1.
constexpr int boundary_of(Payload payload, int stage) { return payload == Payload::activation ? stage : stage - 1; }

/// A result of one micro-batch that a neighbouring stage takes.
struct StageResult {
  Payload payload = Payload::activation;
  int stage = 0;  ///< that makes it
  int micro_batch = 0;
  auto operator<=>(const StageResult&) const = default;

  bool gradient() const { return payload == Payload::gradient; }
  int receiver() const { return receiver_stage(payload, stage); }
  /// As texts name it: the result of F or of I.
  Op op() const { return {producer_of(payload), stage, micro_batch}; }
};

/// What an op takes from a neighbouring stage; nothing at the two ends of the model, and for a W.
constexpr std::optional<StageResult> input_of(const Op& op, int num_stages) {
  const std::optional<Payload> payload = payload_of(op.pass);
  if (!payload) return std::nullopt;
  const int stage = sender_stage(*payload, op.stage);
  if (stage < 0 || stage >= num_stages) return std::nullopt;
  return StageResult{*payload, stage, op.micro_batch};
}

/// What an op hands to a neighbouring stage; nothing at the two ends of the model, and for a W.
constexpr std::optional<StageResult> output_of(const Op& op, int num_stages) {
  const std::optional<Payload> payload = payload_of(op.pass);
  if (!payload) return std::nullopt;
  const StageResult result{*payload, op.stage, op.micro_batch};
  if (result.receiver() < 0 || result.receiver() >= num_stages) return std::nullopt;
  return result;
}

/// The pass of the same stage and micro-batch that comes before.
constexpr std::optional<Pass> pass_before(Pass pass) {
  if (pass == Pass::Forward) return std::nullopt;
  return is_backward(pass) ? Pass::Forward : Pass::BackwardInput;
}

}  // namespace dualpipe::detail
