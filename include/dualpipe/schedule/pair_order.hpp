#pragma once

#include <compare>
#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// One node's run within a step: forward, the input part of its backward (all of it where it is not split), or the
/// weight part.
enum class PairSide : char { forward = 'F', backward = 'B', weight = 'W' };
struct PairOp {
  PairSide side = PairSide::forward;
  int node = 0;  ///< of the forward's chain, or of the backward's
  auto operator<=>(const PairOp&) const = default;
};

/// In which order one host thread runs the forward of one micro-batch and the backward of another, so that the
/// collectives of one hide under the compute of the other. Chains are given by their structure, one letter per node
/// from first to last: 'C' computes, 'X' communicates, as in "CXCX" for attention, dispatch, MLP, combine. Either may
/// be empty: a forward or a backward alone; weight parts then hide what the backward communicates.
///
/// Two chains "CXCX" run in the order of DeepSeek's published trace: combine-B, attention-F, MLP-B, dispatch-F,
/// dispatch-B, MLP-W, MLP-F, attention-B, attention-W, combine-F. All others run by a rule that alternates between the
/// sides, prefers a node that a collective waits for, launches a collective as soon as its input is there, computes a
/// weight part where both sides would wait, and does the weight parts that are left over last, so that results leave
/// early; two single nodes give F, B, W. The rule
/// looks at the structure only, with one fixed guess of how long nodes take, so every rank that runs the same pair
/// launches its collectives in the same order.
///
/// @param weights  false: without the weight parts, for an executor that runs them wherever the next op has to wait;
///                 if nodes take as long as guessed, that is where the whole order has them.
/// @throws InvalidArgument  a letter other than C and X.
DUALPIPE_DECL std::vector<PairOp> pair_order(std::string_view forward, std::string_view backward, bool weights = true);

/// The same ops as a host thread issues them: the order of nodes that compute and that of collectives stay, but each
/// collective moves to the earliest place where its input is there without waiting and those before it are launched. A
/// trace shows when work ran; a host that is busy with a node cannot launch anything until it ends.
///
/// @throws InvalidArgument  `order` is not one of these two chains.
DUALPIPE_DECL std::vector<PairOp> launch_order(std::string_view forward, std::string_view backward,
                                               const std::vector<PairOp>& order);

/// "F0", "B3", "W2"
DUALPIPE_DECL std::string to_string(const PairOp& op);
/// "combine-B, attention-F, …": with the names of the nodes, first to last.
///
/// @throws InvalidArgument  an op of a node without a name.
DUALPIPE_DECL std::string to_string(const std::vector<PairOp>& order, const std::vector<std::string>& forward_names,
                                    const std::vector<std::string>& backward_names);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/pair_order.ipp"
#endif
