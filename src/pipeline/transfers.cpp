#include "dualpipe/detail/pipeline/transfers.hpp"

#include <utility>

namespace dualpipe {

void Transfers::issue(std::size_t next) {
  for (; issued_ < program_.size(); ++issued_) {
    const Instruction& instruction = program_[issued_];
    if (instruction.what == Instruction::Do::receive) {
      receives_[instruction.transfer] =
          context_.communicator.receive((*this)[instruction.transfer].from, expected(instruction.transfer));
    } else if (instruction.what == Instruction::Do::send) {
      const Transfer& transfer = (*this)[instruction.transfer];
      const auto ready = ready_.find({transfer.payload, transfer.stage, transfer.micro_batch});
      if (ready == ready_.end()) return;
      sends_[instruction.transfer] = context_.communicator.send(transfer.to, std::move(ready->second));
      ready_.erase(ready);
    } else if (issued_ >= next) {
      return;
    }
  }
}

Tensors Transfers::take(int index) {
  const auto pending = receives_.find(index);
  Tensors tensors = pending->second.take();
  if (arrivals_ != nullptr) learn(index, tensors);
  record(Lane::receive, index, pending->second);
  receives_.erase(pending);
  return tensors;
}

std::optional<Expected> Transfers::expected(int index) {
  if (!context_.inputs.arrivals) return std::nullopt;
  if (arrivals_ == nullptr) arrivals_ = &context_.inputs.arrivals();
  const std::optional<Signature>& known = arrivals_->signatures[static_cast<std::size_t>(index)];
  if (!known) return std::nullopt;
  const Transfer& transfer = (*this)[index];
  return Expected(
      *known, detail::str("the ", transfer.payload == Payload::activation ? "outputs" : "input gradients", " of stage ",
                          transfer.stage, " for micro-batch ", transfer.micro_batch,
                          " were others before, with inputs of the same shapes; if shapes depend on what is in the "
                          "data, say so by data_dependent_shapes(true) of stage ",
                          Arrivals::shaped_by(transfer), " in the stage factory"));
}

void Transfers::learn(int index, const Tensors& came) {
  std::optional<Signature>& known = arrivals_->signatures[static_cast<std::size_t>(index)];
  if (!known && arrivals_->recurs((*this)[index])) known = signature_of(came);
}

void Transfers::release(int index) {
  const auto pending = sends_.find(index);
  pending->second.wait();
  record(Lane::send, index, pending->second);
  sends_.erase(pending);
}

void Transfers::record(Lane lane, int index, const Pending& pending) const {
  const Transfer& transfer = (*this)[index];
  const Pass producer = transfer.payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
  context_.recorder.record(lane, {{producer, transfer.stage, transfer.micro_batch}, {}}, pending);
}

}  // namespace dualpipe
