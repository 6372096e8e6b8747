#include "dualpipe/stage/pair.hpp"

#include <algorithm>
#include <string>

namespace dualpipe {
namespace {

template <class Pass>
void settle(Pass& pass, Side side, PairListener& listener) {
  if (!pass.under_way()) return;
  const Pending pending = pass.under_way();
  if (!pending.done()) listener.blocks(pending);
  pass.settle();
  listener.collected(side, pending);
}

void over(Side side, PairListener& listener) {
  side == Side::forward ? listener.forward_over() : listener.backward_over();
}

template <class Pass>
void run(Pass& pass, const Piece& piece, PairListener& listener) {
  settle(pass, piece.side, listener);
  listener.begins(piece);
  pass.advance();
  pass.under_way() ? listener.launched(piece) : listener.computed(piece);
  if (pass.advanced() && !pass.under_way()) over(piece.side, listener);
}

/// False: the pass has launched its last collective, which is still under way.
template <class Pass>
bool settle_last(Pass* pass, Side side, PairListener& listener, bool block) {
  if (pass == nullptr || !pass->advanced() || !pass->under_way()) return true;
  if (!block && !pass->under_way().done()) return false;
  listener.turn({side, -1});
  settle(*pass, side, listener);
  over(side, listener);
  return true;
}

}  // namespace

void run_pair(std::span<const Piece> order, ForwardPass* forward, BackwardPass* backward, PairListener& listener) {
  for (const Piece& piece : order) {
    listener.turn(piece);
    if (piece.side == Side::forward) {
      run(*forward, piece, listener);
    } else if (piece.side == Side::backward) {
      run(*backward, piece, listener);
    } else {
      listener.begins(piece);
      backward->activation().backward_weight(piece.node);
      listener.computed(piece);
    }
    settle_last(forward, backward, listener, /*block=*/false);
    listener.between();
  }
}

bool settle_last(ForwardPass* forward, BackwardPass* backward, PairListener& listener, bool block) {
  const bool forward_settled = settle_last(forward, Side::forward, listener, block);
  return settle_last(backward, Side::backward, listener, block) && forward_settled;
}

const PairOrders::Entry& PairOrders::find(const Stage* forward, bool forward_loss, const Stage* backward,
                                          bool backward_loss, bool weights) {
  const auto [found, is_new] = entries_.try_emplace({forward, forward_loss, backward, backward_loss, weights});
  if (is_new) {
    const std::string ahead = forward != nullptr ? forward->structure(forward_loss) : "";
    const std::string back = backward != nullptr ? backward->structure(backward_loss) : "";
    Entry& entry = found->second;
    entry.pieces = launch_order(ahead, back, pair_order(ahead, back, weights));
    entry.communicates = (ahead + back).find('X') != std::string::npos;
    // What computes in front of it, as a loss does, everything else waits for, and it waits for nothing. But a backward
    // that is not split accumulates gradients, whose order must not depend on time.
    const auto first = std::find_if(entry.pieces.begin(), entry.pieces.end(), [&](const Piece& piece) {
      return piece.side == Side::forward || back[static_cast<std::size_t>(piece.node)] == 'X';
    });
    const std::size_t computing = static_cast<std::size_t>(first - entry.pieces.begin());
    if (first != entry.pieces.end() && first->side == Side::backward && (computing == 0 || backward->splits_backward()))
      entry.launch_ahead = computing + 1;
  }
  return found->second;
}

}  // namespace dualpipe
