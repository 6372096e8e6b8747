#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <tuple>
#include <vector>

#include "dualpipe/schedule/pair_order.hpp"
#include "dualpipe/stage/stage_pass.hpp"

namespace dualpipe {

/// What happens while a pair runs, on its thread.
class PairListener {
 public:
  virtual ~PairListener() = default;
  /// The next piece; what is thrown from here on belongs to its side.
  virtual void turn(const Piece& piece) { static_cast<void>(piece); }
  /// A piece begins, behind all waiting; then it has computed, or launched a collective.
  virtual void begins(const Piece& piece) { static_cast<void>(piece); }
  virtual void computed(const Piece& piece) { static_cast<void>(piece); }
  virtual void launched(const Piece& piece) { static_cast<void>(piece); }
  /// The next piece waits for this collective. What the host does meanwhile may end it.
  virtual void blocks(const Pending& pending) { static_cast<void>(pending); }
  /// A collective of this side was waited for and its results are in their places.
  virtual void collected(Side side, const Pending& pending) { static_cast<void>(side), static_cast<void>(pending); }
  /// All nodes of a side have ended; its pass can be taken.
  virtual void forward_over() {}
  virtual void backward_over() {}
  /// Behind each piece, for work of the host's own.
  virtual void between() {}
};

/// Runs the pieces in their order, each side's nodes by its pass: a forward and a backward interleaved, or one of them
/// alone.
///
/// A collective that ends a chain may be under way when this returns: then forward_over or backward_over is still to
/// come, by settle_last.
///
/// @param order     a launch_order of both chains, or the next part of one.
/// @param forward   null where the order has no forward.
/// @param backward  null where the order has no backward.
void run_pair(std::span<const Piece> order, ForwardPass* forward, BackwardPass* backward, PairListener& listener);

/// Settles the last collectives, and tells that their sides are over. Without `block` only those that have ended.
///
/// @return whether none is left.
bool settle_last(ForwardPass* forward, BackwardPass* backward, PairListener& listener, bool block);

/// The launch orders of the pairs that stages form, each made once.
class PairOrders {
 public:
  struct Entry {
    std::vector<Piece> pieces;
    bool communicates = false;  ///< either chain has a collective
    /// How many pieces, all of the backward, come first and launch its first collective; 0: others come first.
    std::size_t launch_ahead = 0;
  };
  /// @param forward, backward  null: that side is empty. Stages are told apart by their address, so they must outlive
  ///                           this and keep their nodes.
  /// @param forward_loss, backward_loss  the chain ends in a loss.
  /// @param weights  as in pair_order.
  const Entry& find(const Stage* forward, bool forward_loss, const Stage* backward, bool backward_loss, bool weights);

 private:
  std::map<std::tuple<const Stage*, bool, const Stage*, bool, bool>, Entry> entries_;
};

}  // namespace dualpipe
