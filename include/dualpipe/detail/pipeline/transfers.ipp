#pragma once

#include "dualpipe/detail/pipeline/transfers.hpp"

#include <exception>
#include <string>
#include <utility>

#include "dualpipe/detail/pipeline/replicas.hpp"

namespace dualpipe::detail {

inline std::string described(const Transfer& transfer) {
  return str(transfer.payload == Payload::activation ? "outputs" : "input gradients", " of stage ", transfer.stage,
             " for micro-batch ", transfer.micro_batch);
}

void Transfers::issue(std::size_t next) {
  const std::vector<Instruction>& program = context_.program();
  for (; issued_ < program.size(); ++issued_) {
    const auto& [what, index, step] = program[issued_];
    if (what == Instruction::Do::receive) {
      receives_[index] = received(index);
    } else if (what == Instruction::Do::send) {
      if (!context_.mailbox.has(result_of(context_.transfer(index)))) return;
      sends_[index] = sent(index);
    } else if (issued_ >= next) {
      return;
    } else if (what == Instruction::Do::reduce) {
      context_.inputs.replicas->begin_sum(context_.plan.program.reductions[index].stage);
    }
  }
}

Transfers::Issued Transfers::received(int index) {
  const Transfer& transfer = context_.transfer(index);
  const FlightRecorder::Id id = context_.flight.issue({.kind = FlightRecorder::Kind::receive,
                                                       .step = {result_of(transfer).op(), {}},
                                                       .peer = context_.communicator.world_rank(transfer.from)});
  return {context_.communicator.receive(transfer.from, expected(index)), id};
}

/// What user code returned may be nothing that travels.
Transfers::Issued Transfers::sent(int index) {
  const Transfer& transfer = context_.transfer(index);
  Tensors tensors = context_.mailbox.take(result_of(transfer));
  const FlightRecorder::Id id = context_.flight.issue({.kind = FlightRecorder::Kind::send,
                                                       .step = {result_of(transfer).op(), {}},
                                                       .peer = context_.communicator.world_rank(transfer.to),
                                                       .bytes = bytes_of(tensors)});
  try {
    return {context_.communicator.send(transfer.to, std::move(tensors)), id};
  } catch (const InvalidArgument& error) {
    std::throw_with_nested(InvalidArgument(context_.explained(str(described(transfer), ": ", error.what()))));
  }
}

void Transfers::deliver(int index) {
  auto& [pending, id] = receives_.at(index);
  if (!pending) return;
  context_.flight.begin(id);
  Tensors tensors = pending.take();
  context_.flight.end(id, bytes_of(tensors));
  if (arrivals_ != nullptr) remember(index, tensors);
  record(Lane::receive, index, pending);
  pending = {};
  context_.mailbox.put(result_of(context_.transfer(index)), std::move(tensors));
}

void Transfers::release(int index) {
  auto& [pending, id] = sends_.at(index);
  context_.flight.begin(id);
  pending.wait();
  context_.flight.end(id);
  record(Lane::send, index, pending);
  sends_.erase(index);
}

std::optional<Expected> Transfers::expected(int index) {
  if (!context_.inputs.arrivals) return std::nullopt;
  if (arrivals_ == nullptr) arrivals_ = &context_.inputs.arrivals();
  const std::optional<Signature>& known = arrivals_->signatures[index];
  if (!known) return std::nullopt;
  const Transfer& transfer = context_.transfer(index);
  return Expected(*known, str("the ", described(transfer),
                              " were others before, with inputs of the same shapes; if shapes depend on what is in the "
                              "data, say so by data_dependent_shapes(true) of stage ",
                              Arrivals::shaped_by(transfer), " in the stage factory"));
}

void Transfers::remember(int index, const Tensors& came) {
  std::optional<Signature>& known = arrivals_->signatures[index];
  if (!known && arrivals_->recurs(context_.transfer(index))) known = signature_of(came);
}

void Transfers::record(Lane lane, int index, const Pending& pending) const {
  if (!context_.recorder.on()) return;
  const Transfer& transfer = context_.transfer(index);
  try {
    context_.recorder.record(lane, {result_of(transfer).op(), {}}, pending);
  } catch (const CommError&) {
    throw;
  } catch (const std::exception& error) {
    std::throw_with_nested(Error(context_.explained(str(described(transfer), ": ", error.what()))));
  }
}

}  // namespace dualpipe::detail
