#pragma once

#include "dualpipe/detail/pipeline/pair_orders.hpp"

#include <algorithm>
#include <string>

namespace dualpipe::detail {

const PairOrders::Entry& PairOrders::find(const Half& forward, const Half& backward, bool weights) {
  const auto [found, is_new] = entries_.try_emplace({forward, backward, weights});
  Entry& entry = found->second;
  if (!is_new) return entry;
  const std::string ahead = forward.stage != nullptr ? forward.stage->structure(forward.loss) : "";
  const std::string back = backward.stage != nullptr ? backward.stage->structure(backward.loss) : "";
  entry.order = launch_order(ahead, back, pair_order(ahead, back, weights));
  // Launching ahead may include leading compute nodes, but not if the backward is unsplit: the order of accumulation
  // would depend on timing.
  const auto first = std::find_if(entry.order.begin(), entry.order.end(), [&](const PairOp& op) {
    return op.side == PairSide::forward || back[op.node] == 'X';
  });
  if (first == entry.order.end() || first->side != PairSide::backward) return entry;
  if (first == entry.order.begin() || backward.stage->splits_backward())
    entry.launch_ahead = first - entry.order.begin() + 1;
  return entry;
}

}  // namespace dualpipe::detail
