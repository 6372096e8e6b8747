#pragma once

#include "dualpipe/schedule/lower.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/flow.hpp"

namespace dualpipe::detail {

using Do = Instruction::Do;

/// The index of the step before a rank's first.
inline constexpr int before_first = -1;

/// The costs that define the global order. They are positive: the proof that no program deadlocks needs that. They are
/// binary fractions, so times are exact and every machine finds the same order.
inline constexpr Costs ordering_costs{.forward = 1, .backward = 2, .weight = 1, .pair = 3, .send = 0.125};

/// A transfer of a rank, and the step after which its send or receive is placed.
struct PlacedTransfer {
  int transfer = 0;
  bool is_send = false;
  int behind = before_first;
};

/// Places the sends and receives of one rank, given in global order. Positions never decrease along that order.
inline std::vector<PlacedTransfer> place_transfers(const Flow& flow, int rank, const std::vector<int>& own) {
  // A send is placed after the step that computes it; a receive before the step that needs it, and before all later
  // transfers in the order.
  std::vector<PlacedTransfer> placed(own.size());
  int latest = 0;
  for (std::size_t i = own.size(); i-- > 0;) {
    const TimedEdge& edge = flow.edges[own[i]];
    const bool is_send = edge.transfer.from == rank;
    const int limit = is_send ? edge.producer : edge.consumer - 1;
    latest = i + 1 == own.size() ? limit : std::min(latest, limit);
    placed[i] = {own[i], is_send, latest};
  }
  // Receives then move to an earlier place, as far as the transfer before them and the limit allow.
  int previous = before_first;
  for (PlacedTransfer& item : placed) {
    if (!item.is_send) {
      const int earliest = flow.edges[item.transfer].consumer - 1 - max_steps_ahead;
      item.behind = std::max(previous, std::min(item.behind, earliest));
    }
    previous = item.behind;
  }
  return placed;
}

/// Writes the programs in the order in which the simulation runs the steps. Each rank carries a vector clock, how many
/// steps of each rank are known to have begun, and sends it with every message.
class ProgramWriter {
 public:
  ProgramWriter(const Schedule& schedule, const Flow& flow)
      : schedule_(schedule), flow_(flow), ranks_(schedule.ranks.size()), carried_(flow.edges.size()) {
    std::vector<std::vector<int>> own(ranks_.size());
    for (int transfer = 0; transfer < static_cast<int>(flow.edges.size()); ++transfer) {
      own[flow.edges[transfer].transfer.from].push_back(transfer);
      own[flow.edges[transfer].transfer.to].push_back(transfer);
    }
    for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
      State& state = ranks_[rank];
      state.placed = place_transfers(flow, static_cast<int>(rank), own[rank]);
      state.begun.assign(ranks_.size(), 0);
      for (const int transfer : own[rank])
        if (flow.edges[transfer].transfer.to == static_cast<int>(rank)) state.needs.push_back(transfer);
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
    std::vector<PlacedTransfer> placed;  // own transfers, in global order
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
      const auto [transfer, is_send, unused] = state.placed[state.next_placed];
      state.program.push_back({is_send ? Do::send : Do::receive, transfer, {}});
      if (!is_send) continue;
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

Program lower(const Schedule& schedule, Publish publish, const PairReady& ready) {
  Costs costs = detail::ordering_costs;
  costs.ready = ready;
  const detail::Flow flow = detail::flow(schedule, costs, publish);
  Program program;
  program.order.reserve(flow.edges.size());
  for (const detail::TimedEdge& edge : flow.edges) program.order.push_back(edge.transfer);
  program.ranks = detail::ProgramWriter{schedule, flow}();
  return program;
}

}  // namespace dualpipe
