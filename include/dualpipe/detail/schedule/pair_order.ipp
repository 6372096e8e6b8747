#pragma once

#include "dualpipe/schedule/pair_order.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <deque>
#include <limits>
#include <optional>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

/// DeepSeek's trace of one layer of attention, dispatch, MLP and combine on both sides.
inline constexpr std::string_view four_node_chain = "CXCX";
inline constexpr std::array<PairOp, 10> four_node_order{{{PairSide::backward, 3},
                                                         {PairSide::forward, 0},
                                                         {PairSide::backward, 2},
                                                         {PairSide::forward, 1},
                                                         {PairSide::backward, 1},
                                                         {PairSide::weight, 2},
                                                         {PairSide::forward, 2},
                                                         {PairSide::backward, 0},
                                                         {PairSide::weight, 0},
                                                         {PairSide::forward, 3}}};

inline void check_chain_structure(std::string_view structure) {
  const std::size_t wrong = structure.find_first_not_of("CX");
  DUALPIPE_CHECK(wrong == std::string_view::npos, "a chain is made of C (computes) and X (communicates), got \"",
                 structure, "\"");
}

/// The rule assumes that a collective takes one and a half times as long as a node that computes, so that a pair of
/// four nodes communicates as long as it computes. Collectives run one after the other.
inline constexpr int guessed_compute_time = 2;
inline constexpr int guessed_collective_time = 3;

/// One side of the pair on its way.
struct PairChain {
  std::string_view structure;
  PairSide side;
  int next;          // node to run
  int input_at = 0;  // when its input is there

  bool over() const { return next < 0 || next >= static_cast<int>(structure.size()); }
  bool communicates() const { return structure[next] == 'X'; }
  /// Whether a collective waits for the next node.
  bool feeds() const {
    const int after = side == PairSide::forward ? next + 1 : next - 1;
    return after >= 0 && after < static_cast<int>(structure.size()) && structure[after] == 'X';
  }
  PairOp advance(int until) {
    input_at = until;
    return {side, side == PairSide::forward ? next++ : next--};
  }
};

inline std::vector<PairOp> pair_order_by_rule(std::string_view forward_nodes, std::string_view backward_nodes) {
  PairChain forward{forward_nodes, PairSide::forward, 0};
  PairChain backward{backward_nodes, PairSide::backward, static_cast<int>(backward_nodes.size()) - 1};
  std::vector<PairOp> order;
  std::deque<PairOp> weights;  // whose input part has run
  int now = 0;
  int network_free = 0;
  std::optional<bool> forward_turn;  // none before the first
  const auto compute_weight = [&] {
    order.push_back(weights.front());
    weights.pop_front();
    now += guessed_compute_time;
  };

  while (!forward.over() || !backward.over()) {
    for (PairChain* chain : {&backward, &forward}) {
      if (chain->over() || !chain->communicates() || chain->input_at > now) continue;
      network_free = std::max(network_free, now) + guessed_collective_time;
      order.push_back(chain->advance(network_free));
    }
    const auto runnable = [&](const PairChain& chain) {
      return !chain.over() && !chain.communicates() && chain.input_at <= now;
    };
    const bool can_forward = runnable(forward), can_backward = runnable(backward);
    // The side whose next node feeds a collective goes first. If both do or neither does, they take turns; the backward
    // begins if a collective follows, since the last node of a chain is often short, as a loss is.
    const bool prefer_forward = can_backward && can_forward && forward.feeds() != backward.feeds()
                                    ? forward.feeds()
                                    : forward_turn.value_or(can_forward && !forward.feeds());
    if (can_forward && (prefer_forward || !can_backward)) {
      now += guessed_compute_time;
      order.push_back(forward.advance(now));
      forward_turn = false;
    } else if (can_backward) {
      now += guessed_compute_time;
      order.push_back(backward.advance(now));
      weights.push_back({PairSide::weight, order.back().node});
      forward_turn = true;
    } else if (!forward.over() || !backward.over()) {
      if (!weights.empty()) {
        compute_weight();
        continue;
      }
      int next = std::numeric_limits<int>::max();
      for (const PairChain& chain : {forward, backward})
        if (!chain.over()) next = std::min(next, chain.input_at);
      now = std::max(now, next);
    }
  }
  while (!weights.empty()) compute_weight();
  return order;
}

}  // namespace dualpipe::detail

namespace dualpipe {

std::vector<PairOp> pair_order(std::string_view forward, std::string_view backward, bool weights) {
  detail::check_chain_structure(forward);
  detail::check_chain_structure(backward);
  std::vector<PairOp> order = forward == detail::four_node_chain && backward == detail::four_node_chain
                                  ? std::vector<PairOp>(detail::four_node_order.begin(), detail::four_node_order.end())
                                  : detail::pair_order_by_rule(forward, backward);
  if (!weights) std::erase_if(order, [](const PairOp& op) { return op.side == PairSide::weight; });
  return order;
}

std::vector<PairOp> launch_order(std::string_view forward, std::string_view backward,
                                 const std::vector<PairOp>& order) {
  detail::check_chain_structure(forward);
  detail::check_chain_structure(backward);
  const auto communicates = [&](const PairOp& op) {
    const std::string_view chain = op.side == PairSide::forward ? forward : backward;
    DUALPIPE_CHECK(op.node >= 0 && op.node < static_cast<int>(chain.size()), "op ", to_string(op),
                   " is no node of a chain \"", chain, "\"");
    return chain[op.node] == 'X';
  };
  std::deque<PairOp> collectives;
  for (const PairOp& op : order)
    if (communicates(op)) collectives.push_back(op);

  int next_forward = 0;
  int next_backward = static_cast<int>(backward.size()) - 1;
  std::vector<PairOp> result;
  const auto issue = [&](const PairOp& op) {
    if (op.side != PairSide::weight) {
      int& next = op.side == PairSide::forward ? next_forward : next_backward;
      DUALPIPE_CHECK(op.node == next, "op ", to_string(op), " comes where node ", next, " is the next of \"",
                     op.side == PairSide::forward ? forward : backward, "\"");
      next += op.side == PairSide::forward ? 1 : -1;
    }
    result.push_back(op);
  };
  // A collective that follows another one directly stays in place: its input is there only after a wait.
  const auto launchable = [&](const PairOp& op) {
    const bool ahead = op.side == PairSide::forward;
    const int before = ahead ? op.node - 1 : op.node + 1;
    const std::string_view chain = ahead ? forward : backward;
    if (before >= 0 && before < static_cast<int>(chain.size()) && chain[before] == 'X') return false;
    return op.node == (ahead ? next_forward : next_backward);
  };
  for (const PairOp& op : order) {
    while (!collectives.empty() && launchable(collectives.front())) {
      issue(collectives.front());
      collectives.pop_front();
    }
    if (!communicates(op)) {
      issue(op);
    } else if (!collectives.empty() && collectives.front() == op) {
      issue(op);
      collectives.pop_front();
    }
  }
  DUALPIPE_CHECK(next_forward == static_cast<int>(forward.size()) && next_backward == -1 && collectives.empty(),
                 "the order leaves nodes of \"", forward, "\" or \"", backward, "\" out");
  return result;
}

std::string to_string(const PairOp& op) { return static_cast<char>(op.side) + std::to_string(op.node); }

std::string to_string(const std::vector<PairOp>& order, const std::vector<std::string>& forward_names,
                      const std::vector<std::string>& backward_names) {
  std::string text;
  for (const PairOp& op : order) {
    const auto& names = op.side == PairSide::forward ? forward_names : backward_names;
    DUALPIPE_CHECK(op.node >= 0 && op.node < static_cast<int>(names.size()), "op ", to_string(op),
                   " is of a node without a name; there are ", names.size(), " names");
    text += (text.empty() ? "" : ", ") + names[op.node] + '-';
    text += static_cast<char>(op.side);
  }
  return text;
}

}  // namespace dualpipe
