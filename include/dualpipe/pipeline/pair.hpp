#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/pair_order.hpp"
#include "dualpipe/stage/stage_run.hpp"

namespace dualpipe {

/// What happened in a pair.
struct PairEvent {
  enum class Kind {
    computed,   ///< `op` has computed
    launched,   ///< `op` has launched its collective
    must_wait,  ///< `op` comes next and takes a collective's result that is not there yet: do something else, or wait()
    received,   ///< what `pending` brought is in its place; op.node is the collective's
    over,       ///< all nodes of op.side have ended: call finish_forward() or finish_backward() of its StageRun
  };
  Kind kind = Kind::computed;
  PairOp op;
  Pending pending = {};  ///< received only
};

/// The forward of one micro-batch and the backward of another, interleaved in a given order; or one of them alone.
/// Asked what comes next, again and again, until nothing does:
///
///     PairRun pair(order, &forward, &backward);
///     while (const std::optional<PairEvent> event = pair.next())
///       if (event->kind == PairEvent::Kind::must_wait) pair.wait();
///     while (pair.trails()) pair.wait();   // collectives at the end of a chain
///
/// A collective that ends a chain has its result taken by nobody in its own stage, so nothing in the pair waits for it:
/// the order can come to its end while it is under way. Every rank of a group runs the same order.
class PairRun {
 public:
  /// @param order     of both chains, each in sequence, as launch_order gives it; outlives this.
  /// @param forward   on its way forward; null where the order has no forward.
  /// @param backward  after start_backward(), and alive until the last weight op of the order; null where it has none.
  PairRun(const std::vector<PairOp>& order, StageRun* forward, StageRun* backward)
      : order_(&order), forward_{forward}, backward_{backward} {}
  /// Of a pair whose first ops, all of the backward, have run without it.
  void add_forward(StageRun* forward) { forward_ = {forward}; }

  /// Does one thing, without waiting for a collective, and says what. Empty where there is nothing to do: the order is
  /// at its end, and no trailing collective has ended. Errors are those of StageRun; at() says whose they are.
  DUALPIPE_DECL std::optional<PairEvent> next();
  /// Waits for the collective that the next op needs, or behind the last op for one that trails (on a device, the
  /// current stream waits). There must be one.
  DUALPIPE_DECL PairEvent wait();

  /// The op that next() runs; null where it does something else. A collective may end in between.
  DUALPIPE_DECL const PairOp* upcoming() const;
  /// Collectives that end a chain are under way.
  bool trails() const { return forward_.trails() || backward_.trails(); }
  /// What runs or ran last; node -1: not a node, but the end of a collective or of the side.
  const PairOp& at() const { return at_; }

 private:
  struct Half {
    StageRun* run = nullptr;
    bool over = false;  // and said so; a forward may be gone

    bool ended() const { return run != nullptr && !over && run->advanced() && !run->under_way(); }
    bool trails() const { return run != nullptr && !over && run->advanced() && run->under_way(); }
    bool has_news() const { return ended() || (trails() && run->under_way().done()); }
  };
  Half& half(PairSide side) { return side == PairSide::forward ? forward_ : backward_; }
  const PairOp* op() const { return position_ < order_->size() ? &(*order_)[position_] : nullptr; }
  DUALPIPE_DECL PairEvent settle(PairSide side);

  const std::vector<PairOp>* order_;
  Half forward_, backward_;
  std::size_t position_ = 0;
  PairOp at_;
};

/// Runs a pair to its end, its trailing collectives included, waiting where it must.
///
/// @param order  as in PairRun.
DUALPIPE_DECL void run_pair(const std::vector<PairOp>& order, StageRun* forward, StageRun* backward);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/pair.ipp"
#endif
