#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/schedule/pair_order.hpp"
#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe::planner {

/// A node of a chain, as a plan sees it.
struct ChainNode {
  std::string name;
  bool communicates = false;
  double duration = 1;  ///< of its forward, of its input part and of its weight part each; a collective has no last
  bool operator==(const ChainNode&) const = default;
};
using Chain = std::vector<ChainNode>;

/// Reads the nodes of a chain, first to last, as in "attention, dispatch@, MLP=2, combine@": names with commas between,
/// '@' behind one that communicates, '=' before a duration; 1 where there is none, 1.5 of a collective. Or letters as
/// pair_order takes them, "CXCX", which get the names C0, X1, …. Empty, or "none": no node.
///
/// @throws InvalidArgument  that quotes the node and says what is wrong with it.
Chain parse_chain(std::string_view text);

/// One letter per node, as pair_order takes it.
std::string structure(const Chain& chain);
std::vector<std::string> names(const Chain& chain);

/// What one rank does when its host runs the ops in this order and launches each collective in its place. Nodes that
/// compute run one after the other, collectives too, and what follows a collective in its chain waits for it. One step
/// of rank 0, with its nodes and collectives: forward 0F1 and backward 0B0, an I where the order has no weight parts.
/// It lasts until the last collective has ended.
///
/// @throws InvalidArgument  as launch_order does; both chains empty.
Timeline pair_timeline(const Chain& forward, const Chain& backward, const std::vector<PairOp>& order);

}  // namespace dualpipe::planner
