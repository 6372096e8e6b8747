#pragma once

#include "dualpipe/detail/schedule/simulator.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {

Simulator::Simulator(Costs costs, Publish publish) : costs_(std::move(costs)), publish_(publish) {}

bool Simulator::load(const Schedule& schedule) {
  std::int64_t forwards = 0;
  for (const auto& steps : schedule.ranks)
    for (const Step& step : steps) forwards += step.op.pass == Pass::Forward;
  DUALPIPE_CHECK(schedule.num_stages >= 1 && schedule.num_micro_batches >= 1,
                 "a schedule needs at least one stage and one micro-batch, got ", schedule.num_stages, " and ",
                 schedule.num_micro_batches);
  // Checked before anything is allocated: a mistyped number must not exhaust the memory.
  const std::int64_t cells = std::int64_t{schedule.num_stages} * schedule.num_micro_batches;
  DUALPIPE_CHECK(forwards == cells, "the schedule has ", forwards, " forwards, but ", schedule.num_stages,
                 " stages with ", schedule.num_micro_batches, " micro-batches each need ", cells);
  DUALPIPE_CHECK(cells < std::numeric_limits<int>::max() / 4, "the schedule has ", cells,
                 " forwards, too many to simulate");
  reshape(schedule);

  for (int rank = 0; rank < static_cast<int>(num_ranks_); ++rank)
    for (int at = 0; at < static_cast<int>(schedule.ranks[rank].size()); ++at) {
      const Step& step = schedule.ranks[rank][at];
      if (step.overlapped)
        DUALPIPE_CHECK(step.op.pass == Pass::Forward && is_backward(step.overlapped->pass), "rank ", rank, ", step ",
                       at, ": a pair is a forward and a backward, got ", to_string(step));
      visit_ops(step, [&](const Op& op) { enter(rank, at, op); });
    }

  // Runs every rank as far as possible. A result wakes the rank that waits for it.
  for (int rank = static_cast<int>(num_ranks_); rank-- > 0;) runnable_.push_back(rank);
  while (!runnable_.empty()) {
    const int rank = runnable_.back();
    runnable_.pop_back();
    missing_[rank] = nothing;
    const auto& steps = schedule.ranks[rank];
    for (int& at = next_[rank]; at < static_cast<int>(steps.size()); ++at) {
      const Step& step = steps[at];
      visit_ops(step, [&](const Op& op) {
        if (missing_[rank] == nothing && made_[input_slot(op)] == 0) missing_[rank] = input_slot(op);
      });
      if (missing_[rank] != nothing) break;
      append(rank, at, step);
    }
  }
  begin_.resize(nodes_.size());
  return std::all_of(missing_.begin(), missing_.end(), [](int slot) { return slot == nothing; });
}

double Simulator::load_or_throw(const Schedule& schedule) {
  DUALPIPE_CHECK(load(schedule), "the schedule '", schedule.name, "' cannot run to its end:", stuck(schedule));
  const double last = makespan();
  DUALPIPE_CHECK(std::isfinite(last), "the costs add up to ", last, ": choose a larger unit");
  return last;
}

void Simulator::reshape(const Schedule& schedule) {
  const std::int64_t cells = std::int64_t{schedule.num_stages} * schedule.num_micro_batches;
  const bool fits = table_ && num_ranks_ == schedule.ranks.size() && num_stages_ == schedule.num_stages;
  num_ranks_ = schedule.ranks.size();
  num_stages_ = schedule.num_stages;
  num_micro_batches_ = schedule.num_micro_batches;
  if (!fits) table_.emplace(costs_, publish_, static_cast<int>(num_ranks_), num_stages_);
  rank_.assign(cells, no_step);
  for (auto& steps : at_) steps.assign(cells, no_step);
  made_.assign(2 + 2 * cells, 0);
  made_[nothing] = 1;
  time_.resize(2 + 2 * cells);
  time_[nothing] = 0;
  next_.assign(num_ranks_, 0);
  missing_.assign(num_ranks_, nothing);
  free_at_.resize(num_ranks_);
  nodes_.clear();
}

void Simulator::enter(int rank, int at, const Op& op) {
  const auto where = [&] { return str("rank ", rank, ", step ", at, " (", to_string(op), ")"); };
  DUALPIPE_CHECK(op.stage >= 0 && op.stage < num_stages_ && op.micro_batch >= 0 && op.micro_batch < num_micro_batches_,
                 where(), ": the schedule has ", num_stages_, " stages and ", num_micro_batches_, " micro-batches");
  const std::int64_t here = cell(op.stage, op.micro_batch);
  int& forward = at_[0][here];
  int& backward = at_[1][here];
  if (op.pass == Pass::Forward) {
    DUALPIPE_CHECK(forward == no_step, where(), ": rank ", rank_[here], " runs this forward too");
    rank_[here] = rank;
    forward = at;
    return;
  }
  DUALPIPE_CHECK(rank_[here] == rank && forward < at, where(), ": its forward is not before it on this rank");
  if (op.pass == Pass::BackwardWeight) {
    DUALPIPE_CHECK(backward != no_step && backward < at, where(),
                   ": its backward for the input is not before it on this rank");
    return;
  }
  DUALPIPE_CHECK(backward == no_step, where(), ": this micro-batch has a backward at step ", backward, " already");
  backward = at;
}

int Simulator::input_slot(const Op& op) const {
  const auto input = input_of(op, num_stages_);
  return input ? slot(*input) : nothing;
}

void Simulator::append(int rank, int at, const Step& step) {
  const StepTimes times = table_->times(step, rank);
  Node& node = nodes_.emplace_back();
  node.rank = rank;
  node.at = at;
  node.duration = times.duration;
  node.input = {input_slot(step.op), step.overlapped ? input_slot(*step.overlapped) : nothing};
  publish(node, 0, step.op, times);
  if (step.overlapped) publish(node, 1, *step.overlapped, times);
}

void Simulator::publish(Node& node, int which, const Op& op, const StepTimes& times) {
  const auto output = output_of(op, num_stages_);
  if (!output) return;
  const int to_stage = output->receiver();
  if (at_[output->gradient()][cell(to_stage, op.micro_batch)] == no_step) return;  // forward only
  const int to = rank_[cell(to_stage, op.micro_batch)];
  const int made = slot(*output);
  node.output[which] = made;
  node.to[which] = to;
  node.ready[which] = to == node.rank ? times.duration : times.ready[which];
  node.send[which] = to == node.rank ? 0 : table_->send(boundary_of(output->payload, op.stage), node.rank, to);
  made_[made] = 1;
  if (to != node.rank && missing_[to] == made) runnable_.push_back(to);
}

std::string Simulator::stuck(const Schedule& schedule) const {
  std::string text;
  const auto cells = static_cast<int>(rank_.size());
  for (std::size_t rank = 0; rank < num_ranks_; ++rank) {
    if (missing_[rank] == nothing) continue;
    const int result = missing_[rank] - 2;
    const Pass pass = producer_of(result < cells ? Payload::activation : Payload::gradient);
    const int where = result % cells;
    text +=
        str("\n  rank ", rank, " at step ", next_[rank], ", ", to_string(schedule.ranks[rank][next_[rank]]),
            ", waits for the result of ", to_string(Op{pass, where / num_micro_batches_, where % num_micro_batches_}),
            " from rank ", rank_[where]);
  }
  return text;
}

}  // namespace dualpipe::detail
