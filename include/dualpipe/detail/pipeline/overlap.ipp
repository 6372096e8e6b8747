#pragma once

#include "dualpipe/detail/pipeline/overlap.hpp"

#include <utility>

namespace dualpipe::detail {

bool Overlap::poll() {
  bool results = false;
  while (trailing_ != nullptr) {
    const StepRun::Event event = trailing_->next();
    if (event == StepRun::Event::trails) break;
    results = results || event == StepRun::Event::half_over;
    if (event == StepRun::Event::over) trailing_.reset();
  }
  return results;
}

void Overlap::launch_ahead(std::size_t next, int cell) {
  if (!context_.fills_waits || !context_.publishes_early() || ahead_ != nullptr) return;
  if (candidate_.at != next) candidate_ = next_backward(next, cell);
  if (candidate_.step == nullptr || !bring_input(candidate_)) return;
  candidate_.step->launch_ahead();
  ahead_ = std::move(candidate_.step);
}

Overlap::Candidate Overlap::next_backward(std::size_t next, int cell) {
  const std::vector<Instruction>& program = context_.program();
  std::size_t at = next;
  while (at < program.size() && program[at].what != Instruction::Do::compute &&
         program[at].what != Instruction::Do::reduce)
    ++at;
  if (at == program.size() || program[at].what == Instruction::Do::reduce) return {next, nullptr};
  Candidate candidate{next, std::make_unique<StepRun>(context_, program[at].step, cell + 1)};
  const Op* const backward = candidate.step->ahead_op();
  if (backward == nullptr) return {next, nullptr};
  candidate.input = input_of(*backward, context_.num_stages());
  for (std::size_t i = next; i < at; ++i)
    if (program[i].what == Instruction::Do::wait &&
        candidate.input == result_of(context_.transfer(program[i].transfer)))
      candidate.transfer = program[i].transfer;
  return candidate;
}

bool Overlap::bring_input(const Candidate& candidate) {
  const Op& backward = *candidate.step->ahead_op();
  if (!context_.micro_batches.has({backward.stage, backward.micro_batch})) return false;
  if (!candidate.input) return true;
  if (candidate.transfer < 0) return context_.mailbox.has(*candidate.input);
  const Pending* const receive = transfers_.receive(candidate.transfer);
  if (receive == nullptr || !receive->done()) return false;
  transfers_.deliver(candidate.transfer);
  return true;
}

}  // namespace dualpipe::detail
