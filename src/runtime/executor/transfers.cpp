#include "runtime/executor/transfers.hpp"

#include <chrono>
#include <thread>
#include <utility>

namespace dualpipe {

void Transfers::issue(std::size_t next) {
  for (; issued_ < program_.size(); ++issued_) {
    const Instruction& instruction = program_[issued_];
    if (instruction.what == Instruction::Do::receive) {
      receives_[instruction.transfer] = context_.communicator.receive((*this)[instruction.transfer].from);
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
  record(Lane::receive, index, pending->second);
  receives_.erase(pending);
  return tensors;
}

void Transfers::release(int index) {
  const auto pending = sends_.find(index);
  pending->second.wait();
  record(Lane::send, index, pending->second);
  sends_.erase(pending);
}

void Transfers::record_rest() {
  for (const Unrecorded& each : std::exchange(unrecorded_, {})) {
    while (!each.pending.done()) std::this_thread::sleep_for(std::chrono::microseconds(50));
    record(each.lane, each.index, each.pending);
  }
}

void Transfers::record(Lane lane, int index, const Pending& pending) {
  if (!context_.observed()) return;
  if (!pending.done()) {
    unrecorded_.push_back({lane, index, pending});
    return;
  }
  const Transfer& transfer = (*this)[index];
  const Pass producer = transfer.payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
  const Span span = pending.span();
  context_.record({context_.communicator.rank(),
                   lane,
                   {{producer, transfer.stage, transfer.micro_batch}, {}},
                   span.begin,
                   span.end});
}

}  // namespace dualpipe
