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
      receives_[index] = context_.communicator.receive(context_.transfer(index).from, expected(index));
    } else if (what == Instruction::Do::send) {
      const Transfer& transfer = context_.transfer(index);
      if (!context_.mailbox.has(result_of(transfer))) return;
      sends_[index] = sent(transfer);
    } else if (issued_ >= next) {
      return;
    } else if (what == Instruction::Do::reduce) {
      context_.inputs.replicas->begin_sum(context_.plan.program.reductions[index].stage);
    }
  }
}

/// What user code returned may be nothing that travels.
Pending Transfers::sent(const Transfer& transfer) {
  try {
    return context_.communicator.send(transfer.to, context_.mailbox.take(result_of(transfer)));
  } catch (const InvalidArgument& error) {
    std::throw_with_nested(
        InvalidArgument(str("rank ", context_.world_rank(), ": ", described(transfer), ": ", error.what())));
  }
}

void Transfers::deliver(int index) {
  Pending& pending = receives_.at(index);
  if (!pending) return;
  Tensors tensors = pending.take();
  if (arrivals_ != nullptr) remember(index, tensors);
  record(Lane::receive, index, pending);
  pending = {};
  context_.mailbox.put(result_of(context_.transfer(index)), std::move(tensors));
}

void Transfers::release(int index) {
  Pending& pending = sends_.at(index);
  pending.wait();
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
  const Transfer& transfer = context_.transfer(index);
  context_.recorder.record(lane, {result_of(transfer).op(), {}}, pending);
}

}  // namespace dualpipe::detail
