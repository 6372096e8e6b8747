#include "dualpipe/planner/residency.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <map>
#include <utility>

#include "dualpipe/detail/schedule/cost_table.hpp"
#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::planner {
namespace {

using Do = Instruction::Do;

class Replay {
 public:
  Replay(const Schedule& schedule, const Program& program, const Costs& costs, TransferStart start, Publish publish)
      : program_(program),
        start_(start),
        num_stages_(schedule.num_stages),
        table_(costs, publish, static_cast<int>(schedule.ranks.size()), schedule.num_stages),
        ranks_(program.ranks.size()),
        posted_(program.order.size(), {pending, pending}),
        end_(program.order.size(), pending) {}

  Residency operator()() && {
    // Each round runs every rank as far as possible, and every transfer whose ends have come to it.
    for (bool moves = true; moves;) {
      moves = false;
      for (int rank = 0; rank < static_cast<int>(ranks_.size()); ++rank) moves = run(rank) || moves;
      for (int rank = 0; rank < static_cast<int>(ranks_.size()); ++rank) moves = transfer(rank) || moves;
    }
    Residency result;
    for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
      DUALPIPE_CHECK(ranks_[rank].at == program_.ranks[rank].size() && ranks_[rank].begun == ranks_[rank].queue.size(),
                     "rank ", rank, " cannot run to its end: it stops at instruction ", ranks_[rank].at, " of ",
                     program_.ranks[rank].size());
      result.ranks.push_back(ranks_[rank].residency);
      result.makespan = std::max(result.makespan, ranks_[rank].now);
    }
    return result;
  }

 private:
  static constexpr double pending = -1;

  struct Rank {
    std::size_t at = 0;  // its next instruction
    double now = 0;
    double posting = 0;  // where its program stands inside the step
    std::map<detail::StageResult, double> published = {};
    std::vector<int> queue = {};  // its transfers
    std::size_t begun = 0;        // of these, those that have ended
    double free_at = 0;           // when the last of them has
    RankResidency residency = {};
  };

  /// Of a rank in `posted_`.
  static int end_of(const Transfer& transfer, int rank) { return transfer.from == rank ? 0 : 1; }

  bool run(int rank) {
    Rank& state = ranks_[rank];
    const std::size_t before = state.at;
    for (; state.at < program_.ranks[rank].size(); ++state.at) {
      const auto& [what, index, step] = program_.ranks[rank][state.at];
      if (what == Do::compute) {
        compute(rank, step);
      } else if (what == Do::send || what == Do::receive) {
        const Transfer& transfer = program_.order[index];
        if (what == Do::send) {
          const auto made = state.published.find({transfer.payload, transfer.stage, transfer.micro_batch});
          DUALPIPE_CHECK(made != state.published.end(), "rank ", rank, " sends ", to_string(transfer),
                         " before it has computed it");
          state.posting = std::max(state.posting, made->second);
        }
        posted_[index][end_of(transfer, rank)] = state.posting;
        state.queue.push_back(index);
      } else if (what == Do::wait || what == Do::release) {
        if (end_[index] == pending) break;
        state.now = std::max(state.now, end_[index]);
        state.posting = state.now;
      }
    }
    return state.at != before;
  }

  void compute(int rank, const Step& step) {
    Rank& state = ranks_[rank];
    const detail::StepTimes times = table_.times(step, rank);
    const auto publish = [&](const Op& op, double ready) {
      if (const auto result = detail::output_of(op, num_stages_)) state.published[*result] = state.now + ready;
    };
    publish(step.op, times.ready[0]);
    if (step.overlapped) publish(*step.overlapped, times.ready[1]);
    state.posting = state.now;  // a send comes next, and moves it to where its tensors are ready
    state.now += times.duration;
    const std::size_t next = state.at + 1;
    const bool sends = next < program_.ranks[rank].size() && program_.ranks[rank][next].what == Do::send;
    if (!sends) state.posting = state.now;
  }

  bool transfer(int rank) {
    Rank& state = ranks_[rank];
    bool any = false;
    for (; state.begun < state.queue.size(); any = true) {
      const int index = state.queue[state.begun];
      const Transfer& transfer = program_.order[index];
      Rank& other = ranks_[transfer.from == rank ? transfer.to : transfer.from];
      if (other.begun >= other.queue.size() || other.queue[other.begun] != index) break;
      const auto& posted = posted_[index];
      const double from = std::max(posted[0], ranks_[transfer.from].free_at);
      const double to = std::max(posted[1], ranks_[transfer.to].free_at);
      const double begin = std::max(from, to);
      const int boundary = detail::boundary_of(transfer.payload, transfer.stage);
      const double moving = table_.send(boundary, transfer.from, transfer.to);
      end_[index] = begin + moving;
      const bool waits = start_ == TransferStart::posted;
      ranks_[transfer.from].residency.resident += end_[index] - (waits ? from : begin);
      ranks_[transfer.to].residency.resident += end_[index] - (waits ? to : begin);
      for (Rank* each : {&state, &other}) {
        each->residency.moving += moving;
        each->free_at = end_[index];
        ++each->begun;
      }
    }
    return any;
  }

  const Program& program_;
  TransferStart start_;
  int num_stages_;
  detail::CostTable table_;
  std::vector<Rank> ranks_;
  std::vector<std::array<double, 2>> posted_;  // by transfer: at the sender, at the receiver
  std::vector<double> end_;                    // by transfer
};

}  // namespace

double Residency::largest_share(double RankResidency::* time) const {
  double largest = 0;
  for (const RankResidency& rank : ranks) largest = std::max(largest, rank.*time / makespan);
  return largest;
}

Residency residency(const Schedule& schedule, const Program& program, const Costs& costs, TransferStart start,
                    Publish publish) {
  return Replay(schedule, program, costs, start, publish)();
}

}  // namespace dualpipe::planner
