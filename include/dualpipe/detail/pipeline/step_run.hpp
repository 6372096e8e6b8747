#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/run_context.hpp"
#include "dualpipe/pipeline/pair.hpp"

namespace dualpipe::detail {

/// One step of the schedule under way on one rank: a forward, a backward, both interleaved, or weight parts. Takes what
/// it needs from the mailbox and puts its results there. What it throws says where.
class StepRun {
 public:
  enum class Event {
    ran,           ///< something was done
    half_over,     ///< the forward or the backward has ended; what another stage takes of it is in the mailbox
    must_wait,     ///< for a collective: run_weight_part() if there is one, else wait()
    weights_left,  ///< only weight parts are left: run_weight_part()
    trails,        ///< all is done but a collective that ends a chain: wait(), now or later
    over,
  };

  /// @param cell  number of the step on its rank.
  DUALPIPE_DECL StepRun(RunContext& context, const Step& step, int cell);

  /// Does the next thing that needs no waiting, and says what.
  DUALPIPE_DECL Event next();
  DUALPIPE_DECL void wait();
  /// The next piece of a weight part that has no place in the order. False: there is none.
  DUALPIPE_DECL bool run_weight_part();

  /// The backward whose first collective may be launched ahead; null: none.
  DUALPIPE_DECL const Op* ahead_op() const;
  /// Before the step's turn, when what its backward takes is there: goes as far as launching that collective.
  DUALPIPE_DECL void launch_ahead();
  /// Tells the observers of the step as a whole.
  DUALPIPE_DECL void record_step(const Step& step, const Mark& begin);
  /// So `later` may take its results.
  DUALPIPE_DECL bool shares_micro_batch(const Step& later) const;

 private:
  DUALPIPE_DECL void start_forward();
  DUALPIPE_DECL void start_backward();
  DUALPIPE_DECL Event advance();
  DUALPIPE_DECL void end_forward();
  /// @throws InvalidArgument  in the first step: forwards of two micro-batches have used a tensor that requires grad and that no module of
  ///                          this rank has.
  DUALPIPE_DECL void check_registered() const;
  DUALPIPE_DECL void end_backward();
  DUALPIPE_DECL void release_backward();
  DUALPIPE_DECL void record(const PairOp& op, const Mark& begin) const;
  DUALPIPE_DECL void record_received(const PairEvent& event) const;
  /// For a profiler, around an op of a step whose nodes are recorded; null: nothing.
  DUALPIPE_DECL Recorder::Range range_of(const PairOp* op) const;
  DUALPIPE_DECL std::string node_name(const PairOp& op) const;
  const Op& op_of(PairSide side) const { return side == PairSide::forward ? *forward_op_ : *backward_op_; }
  /// What an op of the pair is in a trace.
  DUALPIPE_DECL Op recorded(const PairOp& op) const;

  template <class Body>
  std::invoke_result_t<Body> explained(const Body& body);
  [[noreturn]] DUALPIPE_DECL void rethrow_explained() const;
  DUALPIPE_DECL std::string explain(const std::string& what) const;

  RunContext& context_;
  int cell_;
  std::optional<Op> forward_op_, backward_op_;
  bool communicates_;  // some stage of the step: its nodes are recorded one by one, and a B is split for its pauses
  const PairOrders::Entry* order_ = nullptr;
  std::unique_ptr<MicroBatch> forward_, backward_;  // while this step works on them
  std::optional<PairRun> pair_;
  bool started_ = false;
  bool input_part_over_ = false;  // of the backward; a W begins so
  std::deque<int> weights_;  // nodes whose weight parts are due: of a W, or of a B if they have no places in the order
  std::optional<PairOp> own_;  // what runs outside of the pair, for errors
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/step_run.ipp"
#endif
