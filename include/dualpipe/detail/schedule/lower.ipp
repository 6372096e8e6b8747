#pragma once

#include "dualpipe/schedule/lower.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/flow.hpp"
#include "dualpipe/detail/schedule/for_each_op.hpp"

namespace dualpipe::detail {

using Do = Instruction::Do;

/// The index of the step before a rank's first.
inline constexpr int before_first = -1;

/// The costs that define the global order. They are positive: the proof that no program deadlocks needs that. They are
/// binary fractions, so times are exact and every machine finds the same order.
inline constexpr Costs ordering_costs{.forward = 1, .backward = 2, .weight = 1, .pair = 3, .send = 0.125};

/// A send, receive or reduce of a rank, and the step behind which it is placed.
struct Placed {
  Do what = Do::send;
  int index = 0;  ///< as Instruction::transfer
  int behind = before_first;
};

/// A sum, and when it is ready: all its ranks have run their last weight part of the stage.
struct TimedReduction {
  Reduction reduction;
  double ready = 0;
};

/// In global order. Of sums and transfers that are ready at one time the transfers come first: the step that ends then
/// may have made them.
inline std::vector<TimedReduction> timed_reductions(const Schedule& schedule, const Flow& flow, int num_replicas,
                                                    const Schedule* held_as) {
  std::vector<TimedReduction> all(schedule.num_stages);
  for (int rank = 0; rank < static_cast<int>(schedule.ranks.size()); ++rank)
    for (std::size_t at = 0; at < schedule.ranks[rank].size(); ++at)
      visit_ops(schedule.ranks[rank][at], [&](const Op& op) {
        if (op.pass != Pass::Backward && op.pass != Pass::BackwardWeight) return;
        auto& [reduction, ready] = all[op.stage];
        if (reduction.ranks.empty() || reduction.ranks.back() != rank) reduction.ranks.push_back(rank);
        ready = std::max(ready, flow.begin[rank][at] + flow.duration[rank][at]);
      });
  for (int stage = 0; stage < schedule.num_stages; ++stage) all[stage].reduction.stage = stage;
  if (held_as != nullptr) {
    const std::vector<std::vector<int>> held = holders(*held_as);
    for (int stage = 0; stage < schedule.num_stages; ++stage) all[stage].reduction.ranks = held[stage];
  }
  std::erase_if(all, [&](const TimedReduction& each) {
    return static_cast<std::int64_t>(each.reduction.ranks.size()) * num_replicas < 2;
  });
  std::stable_sort(all.begin(), all.end(),
                   [](const TimedReduction& a, const TimedReduction& b) { return a.ready < b.ready; });
  for (auto& [reduction, ready] : all) {
    const auto first_later = std::upper_bound(flow.edges.begin(), flow.edges.end(), ready,
                                              [](double time, const TimedEdge& edge) { return time < edge.ready; });
    reduction.behind = static_cast<int>(first_later - flow.edges.begin());
  }
  return all;
}

/// The last step of a rank that has ended at that time.
inline int last_ended(const Flow& flow, int rank, double time) {
  int last = before_first;
  for (int at = 0; at < static_cast<int>(flow.begin[rank].size()); ++at)
    if (flow.begin[rank][at] + flow.duration[rank][at] <= time) last = at;
  return last;
}

/// What each rank sends, receives and reduces, in global order; not placed yet.
inline std::vector<std::vector<Placed>> own_operations(const Flow& flow,
                                                       const std::vector<TimedReduction>& reductions) {
  std::vector<std::vector<Placed>> own(flow.begin.size());
  std::size_t next = 0;
  const auto add_reductions = [&](int behind) {
    for (; next < reductions.size() && reductions[next].reduction.behind == behind; ++next)
      for (const int rank : reductions[next].reduction.ranks) own[rank].push_back({Do::reduce, static_cast<int>(next)});
  };
  for (int transfer = 0; transfer < static_cast<int>(flow.edges.size()); ++transfer) {
    add_reductions(transfer);
    own[flow.edges[transfer].transfer.from].push_back({Do::send, transfer});
    own[flow.edges[transfer].transfer.to].push_back({Do::receive, transfer});
  }
  add_reductions(static_cast<int>(flow.edges.size()));
  return own;
}

/// Places the operations of one rank, given in global order. Positions never decrease along that order.
inline void place(const Flow& flow, const std::vector<TimedReduction>& reductions, int rank, std::vector<Placed>& own) {
  // A send is placed behind the step that computes it; a receive before the step that needs it; all of them before
  // whatever is later in the order.
  int latest = static_cast<int>(flow.begin[rank].size()) - 1;
  for (std::size_t i = own.size(); i-- > 0;) {
    if (own[i].what == Do::send) latest = std::min(latest, flow.edges[own[i].index].producer);
    if (own[i].what == Do::receive) latest = std::min(latest, flow.edges[own[i].index].consumer - 1);
    own[i].behind = latest;
  }
  // Receives and reduces then move to an earlier place, as far as what is before them and their own limit allow. A
  // reduce stays behind the last weight part of its stage: whatever is later in the order is so too.
  int previous = before_first;
  for (Placed& item : own) {
    if (item.what != Do::send) {
      const int earliest = item.what == Do::receive ? flow.edges[item.index].consumer - 1 - max_steps_ahead
                                                    : last_ended(flow, rank, reductions[item.index].ready);
      item.behind = std::max(previous, std::min(item.behind, earliest));
    }
    previous = item.behind;
  }
}

/// Writes the programs in the order in which the simulation runs the steps. Each rank carries a vector clock, how many
/// steps of each rank are known to have begun, and sends it with every message.
class ProgramWriter {
 public:
  ProgramWriter(const Schedule& schedule, const Flow& flow, const std::vector<TimedReduction>& reductions)
      : schedule_(schedule), flow_(flow), ranks_(schedule.ranks.size()), carried_(flow.edges.size()) {
    std::vector<std::vector<Placed>> own = own_operations(flow, reductions);
    for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
      State& state = ranks_[rank];
      place(flow, reductions, static_cast<int>(rank), own[rank]);
      state.placed = std::move(own[rank]);
      state.begun.assign(ranks_.size(), 0);
      for (const Placed& item : state.placed)
        if (item.what == Do::receive) state.needs.push_back(item.index);
      std::sort(state.needs.begin(), state.needs.end(), [&](int a, int b) {
        return std::pair(flow.edges[a].consumer, a) < std::pair(flow.edges[b].consumer, b);
      });
    }
  }

  std::vector<std::vector<Instruction>> operator()() && {
    struct Start {
      double time;
      int rank;
      int step;
      auto operator<=>(const Start&) const = default;
    };
    std::vector<Start> starts;
    for (int rank = 0; rank < static_cast<int>(ranks_.size()); ++rank) {
      write_transfers(rank, before_first);
      for (int at = 0; at < static_cast<int>(flow_.begin[rank].size()); ++at)
        starts.push_back({flow_.begin[rank][at], rank, at});
    }
    std::sort(starts.begin(), starts.end());
    for (const Start& start : starts) write_step(start.rank, start.step);

    std::vector<std::vector<Instruction>> programs;
    programs.reserve(ranks_.size());
    for (State& state : ranks_) {
      release_if(state, [](const Unreleased&) { return true; });
      programs.push_back(std::move(state.program));
    }
    return programs;
  }

 private:
  struct Unreleased {
    int transfer = 0;
    int later_sends = 0;  // to the same rank
  };

  struct State {
    std::vector<Instruction> program;
    std::vector<Placed> placed;  // own operations, in global order
    std::size_t next_placed = 0;
    std::vector<int> needs;  // transfers that arrive here, by the step that needs them
    std::size_t next_need = 0;
    std::vector<int> begun;              // per rank: how many of its steps are known to have begun
    std::vector<Unreleased> unreleased;  // oldest first
  };

  void write_step(int rank, int at) {
    State& state = ranks_[rank];
    while (state.next_need < state.needs.size() && flow_.edges[state.needs[state.next_need]].consumer == at) {
      const int transfer = state.needs[state.next_need++];
      state.program.push_back({Do::wait, transfer, {}});
      learn(state, transfer);
    }
    state.begun[rank] = at + 1;
    state.program.push_back({Do::compute, -1, schedule_.ranks[rank][at]});
    write_transfers(rank, at);
  }

  /// Merges the vector clock of the sender, and releases the sends whose receiver is now known to have begun the step
  /// that needs them.
  void learn(State& state, int transfer) {
    const std::vector<int> news = std::move(carried_[transfer]);
    for (std::size_t rank = 0; rank < news.size(); ++rank) state.begun[rank] = std::max(state.begun[rank], news[rank]);
    release_if(state, [&](const Unreleased& sent) {
      const TimedEdge& edge = flow_.edges[sent.transfer];
      return state.begun[edge.transfer.to] > edge.consumer;
    });
  }

  void write_transfers(int rank, int behind) {
    State& state = ranks_[rank];
    for (; state.next_placed < state.placed.size() && state.placed[state.next_placed].behind == behind;
         ++state.next_placed) {
      const auto [what, transfer, unused] = state.placed[state.next_placed];
      state.program.push_back({what, transfer, {}});
      if (what != Do::send) continue;
      carried_[transfer] = state.begun;
      for (Unreleased& sent : state.unreleased)
        sent.later_sends += flow_.edges[sent.transfer].transfer.to == flow_.edges[transfer].transfer.to;
      state.unreleased.push_back({transfer});
    }
    release_if(state, [](const Unreleased& sent) { return sent.later_sends >= max_unreleased_sends; });
  }

  template <class Predicate>
  void release_if(State& state, const Predicate& due) {
    for (const Unreleased& sent : state.unreleased)
      if (due(sent)) state.program.push_back({Do::release, sent.transfer, {}});
    std::erase_if(state.unreleased, due);
  }

  const Schedule& schedule_;
  const Flow& flow_;
  std::vector<State> ranks_;
  std::vector<std::vector<int>> carried_;  // per transfer in flight: the sender's vector clock
};

}  // namespace dualpipe::detail

namespace dualpipe {

Program lower(const Schedule& schedule, Publish publish, const PairReady& ready, int num_replicas,
              const Schedule* held_as) {
  Costs costs = detail::ordering_costs;
  costs.ready = ready;
  const detail::Flow flow = detail::flow(schedule, costs, publish);
  Program program;
  program.order.reserve(flow.edges.size());
  for (const detail::TimedEdge& edge : flow.edges) program.order.push_back(edge.transfer);
  const std::vector<detail::TimedReduction> reductions =
      detail::timed_reductions(schedule, flow, num_replicas, held_as);
  for (const auto& [reduction, time] : reductions) program.reductions.push_back(reduction);
  program.ranks = detail::ProgramWriter{schedule, flow, reductions}();
  return program;
}

}  // namespace dualpipe
