#pragma once

#include "dualpipe/schedule/lower.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {

using Do = Instruction::Do;

inline const char* instruction_name(Do what) {
  switch (what) {
    case Do::receive:
      return "receive";
    case Do::wait:
      return "wait for";
    case Do::compute:
      return "compute";
    case Do::send:
      return "send";
    case Do::reduce:
      return "reduce";
    case Do::release:
      break;
  }
  return "release";
}

class DryRun {
 public:
  explicit DryRun(const Program& program)
      : program_(program),
        at_(program.ranks.size(), 0),
        last_(program.ranks.size()),
        done_(program.order.size()),
        reduced_(program.reductions.size(), false) {
    measure();
    computed_[0].assign(cells_, none);
    computed_[1].assign(cells_, none);
    incoming_[0].assign(cells_, none);
    incoming_[1].assign(cells_, none);
    for (int transfer = 0; transfer < static_cast<int>(program.order.size()); ++transfer) enter(transfer);
    if (!program.reductions.empty()) count_weight_parts();
    for (int reduction = 0; reduction < static_cast<int>(program.reductions.size()); ++reduction)
      enter_reduction(reduction);
  }

  void operator()() && {
    std::vector<int> runnable;
    for (int rank = size(); rank-- > 0;) runnable.push_back(rank);
    while (!runnable.empty()) {
      const int rank = runnable.back();
      runnable.pop_back();
      while (const Instruction* instruction = current(rank)) {
        if (instruction->what == Do::send || instruction->what == Do::receive) {
          const int peer = meet(rank, *instruction);
          if (peer == none) break;
          runnable.push_back(peer);
        } else if (instruction->what == Do::reduce) {
          if (!reduce(rank, *instruction)) break;
          for (const int other : program_.reductions[instruction->transfer].ranks)
            if (other != rank) runnable.push_back(other);
        } else {
          perform(rank, *instruction);
          ++at_[rank];
        }
      }
    }
    check_finished();
    DUALPIPE_CHECK(disorder_.empty(), disorder_);
  }

 private:
  static constexpr int none = -1;

  /// Where an operation stands in the global order: transfer i at {i + 1, none}, sum j at {behind, j}.
  using Place = std::pair<int, int>;

  struct Done {
    bool sent = false, waited = false, released = false;  // a transfer is received when it is sent
  };

  int size() const { return static_cast<int>(program_.ranks.size()); }

  const Instruction* current(int rank) const {
    return at_[rank] < program_.ranks[rank].size() ? &program_.ranks[rank][at_[rank]] : nullptr;
  }

  /// Finds the size of the tables. Every stage and micro-batch has a forward, so they are no larger than the program.
  void measure() {
    std::int64_t forwards = 0;
    const auto see = [&](const Op& op) {
      DUALPIPE_CHECK(op.stage >= 0 && op.micro_batch >= 0, "a program names no negative numbers, got ", to_string(op));
      num_stages_ = std::max<std::int64_t>(num_stages_, std::int64_t{op.stage} + 1);
      num_micro_batches_ = std::max<std::int64_t>(num_micro_batches_, std::int64_t{op.micro_batch} + 1);
      forwards += op.pass == Pass::Forward;
    };
    for (const auto& instructions : program_.ranks)
      for (const Instruction& instruction : instructions) {
        if (instruction.what != Do::compute) continue;
        visit_ops(instruction.step, see);
      }
    DUALPIPE_CHECK(num_stages_ * num_micro_batches_ == forwards, "the program has ", forwards, " forwards, but ",
                   num_stages_, " stages with ", num_micro_batches_, " micro-batches each need ",
                   num_stages_ * num_micro_batches_);
    cells_ = forwards;
  }

  void count_weight_parts() {
    weights_left_.resize(program_.ranks.size());
    for (std::size_t rank = 0; rank < program_.ranks.size(); ++rank)
      for (const Instruction& instruction : program_.ranks[rank]) {
        if (instruction.what != Do::compute) continue;
        visit_ops(instruction.step, [&](const Op& op) { weights_left_[rank][op.stage] += has_weight_part(op); });
      }
  }

  static bool has_weight_part(const Op& op) { return op.pass == Pass::Backward || op.pass == Pass::BackwardWeight; }

  std::int64_t cell(int stage, int micro_batch) const { return stage * num_micro_batches_ + micro_batch; }
  static StageResult result_of(const Transfer& transfer) {
    return {transfer.payload, transfer.stage, transfer.micro_batch};
  }
  /// The rank that has computed it so far, or none.
  int computed(const StageResult& result) const {
    return computed_[result.gradient()][cell(result.stage, result.micro_batch)];
  }

  void enter(int index) {
    const Transfer& transfer = program_.order[index];
    DUALPIPE_CHECK(transfer.stage >= 0 && transfer.stage < num_stages_ && transfer.micro_batch >= 0 &&
                       transfer.micro_batch < num_micro_batches_,
                   "transfer ", index, ", ", to_string(transfer), ": the program computes ", num_stages_,
                   " stages and ", num_micro_batches_, " micro-batches");
    DUALPIPE_CHECK(transfer.from >= 0 && transfer.from < size() && transfer.to >= 0 && transfer.to < size() &&
                       transfer.from != transfer.to,
                   "transfer ", index, ", ", to_string(transfer), ": expected two different ranks below ", size());
    int& entry = incoming_[transfer.payload == Payload::gradient][cell(transfer.stage, transfer.micro_batch)];
    DUALPIPE_CHECK(entry == none, "transfers ", entry, " and ", index, " are the same: ", to_string(transfer));
    entry = index;
  }

  void enter_reduction(int index) {
    const auto& [stage, ranks, behind] = program_.reductions[index];
    const auto name = [&, at = stage] { return str("sum ", index, ", of the gradients of stage ", at); };
    DUALPIPE_CHECK(stage >= 0 && stage < num_stages_, name(), ": the program computes ", num_stages_, " stages");
    DUALPIPE_CHECK(!ranks.empty() && ranks.front() >= 0 && ranks.back() < size() &&
                       std::adjacent_find(ranks.begin(), ranks.end(), std::greater_equal<>()) == ranks.end(),
                   name(), ": expected ascending ranks below ", size());
    DUALPIPE_CHECK(behind >= 0 && behind <= static_cast<int>(program_.order.size()) &&
                       (index == 0 || program_.reductions[index - 1].behind <= behind),
                   name(), ": behind ", behind, " transfers of ", program_.order.size(),
                   " and not before the sum in front of it");
  }

  std::string where(int rank) const {
    const Instruction* instruction = current(rank);
    const std::string place = str("rank ", rank, " at instruction ", at_[rank], " of ", program_.ranks[rank].size());
    if (instruction == nullptr) return place + " (finished)";
    return place + ", " + instruction_name(instruction->what) + " " +
           (instruction->what == Do::compute  ? to_string(instruction->step)
            : instruction->what == Do::reduce ? describe_reduction(instruction->transfer)
                                              : describe(instruction->transfer));
  }

  std::string describe(int transfer) const {
    return str("transfer ", transfer, ", ", to_string(program_.order[transfer]));
  }

  std::string describe_reduction(int index) const {
    if (index < 0 || index >= static_cast<int>(program_.reductions.size())) return str("sum ", index);
    return str("sum ", index, ", of the gradients of stage ", program_.reductions[index].stage);
  }

  void check_transfer(int rank, const Instruction& instruction, bool sender) const {
    DUALPIPE_CHECK(instruction.transfer >= 0 && instruction.transfer < static_cast<int>(program_.order.size()), "rank ",
                   rank, " at instruction ", at_[rank], ": transfer ", instruction.transfer, " of ",
                   program_.order.size());
    const Transfer& transfer = program_.order[instruction.transfer];
    DUALPIPE_CHECK((sender ? transfer.from : transfer.to) == rank, where(rank), ": this rank is not its ",
                   sender ? "sender" : "receiver");
  }

  /// A rank has reached a send or receive. If its peer has reached it too, both go on. Returns the peer, or none.
  int meet(int rank, const Instruction& mine) {
    const bool sender = mine.what == Do::send;
    check_transfer(rank, mine, sender);
    const Transfer& transfer = program_.order[mine.transfer];
    if (sender) {
      DUALPIPE_CHECK(computed(result_of(transfer)) == rank, where(rank), ": not computed here before");
    }
    const int peer = sender ? transfer.to : transfer.from;
    const Instruction* theirs = current(peer);
    if (theirs == nullptr || theirs->transfer != mine.transfer || theirs->what != (sender ? Do::receive : Do::send))
      return none;
    // The peer reached this transfer first and has made its own checks.
    Done& done = done_[mine.transfer];
    DUALPIPE_CHECK(!done.sent, where(rank), ": for the second time");
    done.sent = true;
    for (const int end : {rank, peer}) keep_order(end, {mine.transfer + 1, none});
    ++at_[rank];
    ++at_[peer];
    return peer;
  }

  /// A rank has reached a sum. If all its ranks have, all go on.
  bool reduce(int rank, const Instruction& mine) {
    DUALPIPE_CHECK(mine.transfer >= 0 && mine.transfer < static_cast<int>(program_.reductions.size()), where(rank),
                   " of ", program_.reductions.size());
    const Reduction& reduction = program_.reductions[mine.transfer];
    DUALPIPE_CHECK(std::find(reduction.ranks.begin(), reduction.ranks.end(), rank) != reduction.ranks.end(),
                   where(rank), ": this rank does not hold the stage");
    DUALPIPE_CHECK(weights_left_[rank][reduction.stage] == 0, where(rank), ": ", weights_left_[rank][reduction.stage],
                   " weight parts of the stage are still to come here");
    for (const int other : reduction.ranks) {
      const Instruction* theirs = current(other);
      if (theirs == nullptr || theirs->what != Do::reduce || theirs->transfer != mine.transfer) return false;
    }
    DUALPIPE_CHECK(!reduced_[mine.transfer], where(rank), ": for the second time");
    reduced_[mine.transfer] = true;
    for (const int each : reduction.ranks) {
      keep_order(each, {reduction.behind, mine.transfer});
      ++at_[each];
    }
    return true;
  }

  void keep_order(int rank, const Place& place) {
    if (last_[rank] > place && disorder_.empty())
      disorder_ =
          str(where(rank), ": behind ",
              last_[rank].second == none ? describe(last_[rank].first - 1) : describe_reduction(last_[rank].second),
              "; the ranks must keep to the global order of transfers");
    last_[rank] = place;
  }

  void perform(int rank, const Instruction& instruction) {
    if (instruction.what == Do::compute) {
      visit_ops(instruction.step, [&](const Op& op) { compute(rank, op); });
      visit_ops(instruction.step, [&](const Op& op) { mark(rank, op); });
      return;
    }
    const bool sender = instruction.what == Do::release;
    check_transfer(rank, instruction, sender);
    Done& done = done_[instruction.transfer];
    DUALPIPE_CHECK(done.sent, where(rank), ": before this rank has ", sender ? "sent" : "received", " it");
    bool& flag = sender ? done.released : done.waited;
    DUALPIPE_CHECK(!flag, where(rank), ": for the second time");
    flag = true;
  }

  /// The input of an op is there: it was waited for, or computed on this rank.
  void check_input(int rank, const StageResult& input) const {
    const int transfer = incoming_[input.gradient()][cell(input.stage, input.micro_batch)];
    if (transfer != none && program_.order[transfer].to == rank) {
      DUALPIPE_CHECK(done_[transfer].waited, where(rank), ": has not waited for ", describe(transfer));
    } else {
      DUALPIPE_CHECK(computed(input) == rank, where(rank), ": its input ", to_string(input.op()),
                     " is neither received nor computed here before");
    }
  }

  void compute(int rank, const Op& op) const {
    const auto own = [&](Payload payload) { return computed({payload, op.stage, op.micro_batch}); };
    if (op.pass != Pass::Forward)
      DUALPIPE_CHECK(own(Payload::activation) == rank, where(rank), ": no forward on this rank before");
    if (const auto payload = payload_of(op.pass)) {
      DUALPIPE_CHECK(own(*payload) == none, where(rank), ": computed before, on rank ", own(*payload));
      if (const auto input = input_of(op, static_cast<int>(num_stages_))) check_input(rank, *input);
    } else {
      DUALPIPE_CHECK(own(Payload::gradient) == rank, where(rank), ": no backward for the input on this rank before");
    }
  }

  void mark(int rank, const Op& op) {
    if (!weights_left_.empty() && has_weight_part(op)) --weights_left_[rank][op.stage];
    if (const auto payload = payload_of(op.pass))
      computed_[*payload == Payload::gradient][cell(op.stage, op.micro_batch)] = rank;
  }

  void check_finished() const {
    std::string stuck;
    for (int rank = 0; rank < size(); ++rank)
      if (current(rank) != nullptr) stuck += "\n  " + where(rank);
    DUALPIPE_CHECK(stuck.empty(), "the program does not run to its end with one transfer at a time per rank:", stuck);
    for (int transfer = 0; transfer < static_cast<int>(done_.size()); ++transfer) {
      const Done& done = done_[transfer];
      DUALPIPE_CHECK(done.sent && done.waited && done.released, describe(transfer), ": is never ",
                     !done.sent     ? "sent"
                     : !done.waited ? "waited for"
                                    : "released");
    }
    for (int index = 0; index < static_cast<int>(reduced_.size()); ++index)
      DUALPIPE_CHECK(reduced_[index], describe_reduction(index), ": is never begun");
  }

  const Program& program_;
  std::vector<std::size_t> at_;                   // per rank: index of its next instruction
  std::vector<Place> last_;                       // per rank: its last transfer or sum
  std::vector<Done> done_;                        // per transfer
  std::vector<bool> reduced_;                     // per sum
  std::vector<std::map<int, int>> weights_left_;  // per rank and stage; empty without sums
  std::string disorder_;                          // the first departure from the global order
  std::int64_t num_stages_ = 0, num_micro_batches_ = 0;
  std::int64_t cells_ = 0;
  // Both per (stage, micro-batch): [0] forward or activation, [1] backward or gradient.
  std::vector<int> computed_[2];  // by which rank, so far
  std::vector<int> incoming_[2];  // index of the transfer that carries the result
};

}  // namespace dualpipe::detail

namespace dualpipe {

void dry_run(const Program& program) { detail::DryRun{program}(); }

}  // namespace dualpipe
