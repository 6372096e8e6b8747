#pragma once

#include <cstddef>
#include <map>
#include <tuple>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/pair_order.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe::detail {

/// The orders in which pairs of stages run, each made once.
class PairOrders {
 public:
  /// One half of a pair. Stages are told apart by their address, so they outlive this and keep their nodes.
  struct Half {
    const Stage* stage = nullptr;  ///< null: there is none
    bool loss = false;             ///< the chain ends in a loss
    auto operator<=>(const Half&) const = default;
  };
  struct Entry {
    std::vector<PairOp> order;
    /// How many ops, all of the backward, come first and launch its first collective; 0: others come first.
    std::size_t launch_ahead = 0;
  };
  /// @param weights  as in pair_order.
  DUALPIPE_DECL const Entry& find(const Half& forward, const Half& backward, bool weights);

 private:
  std::map<std::tuple<Half, Half, bool>, Entry> entries_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/pair_orders.ipp"
#endif
