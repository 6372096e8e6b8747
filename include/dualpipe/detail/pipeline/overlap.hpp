#pragma once

#include <cstddef>
#include <memory>
#include <optional>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/step_run.hpp"
#include "dualpipe/detail/pipeline/transfers.hpp"

namespace dualpipe::detail {

/// What of a step runs under its neighbours on the rank:
///  * A collective that ends a chain trails: it runs on under the next step. No deadlock: a rank finishes its trailing
///    collective, and issues the sends that wait for it, before it blocks. Its peers launch it in the same step, and
///    before whatever they launch later.
///  * The collective with which the next step's backward begins is launched ahead, between weight parts, once what it
///    takes is here. When that is depends on timing; the order of collectives does not, as only weight parts lie
///    between: no sum of gradients does.
class Overlap {
 public:
  Overlap(RunContext& context, Transfers& transfers) : context_(context), transfers_(transfers) {}

  bool trails() const { return trailing_ != nullptr; }
  /// `step` may take what the trailing step brings.
  bool trailing_feeds(const Step& step) const { return trailing_ && trailing_->shares_micro_batch(step); }
  /// Nothing trails before.
  void trail(std::unique_ptr<StepRun> step) { trailing_ = std::move(step); }
  /// Goes on with the trailing step, without waiting. @return whether results are in the mailbox.
  DUALPIPE_DECL bool poll();
  /// Waits for a collective of the trailing step; to be followed by poll().
  void wait() { trailing_->wait(); }

  /// Between two weight parts.
  ///
  /// @param next  instruction to come.
  /// @param cell  step under way.
  DUALPIPE_DECL void launch_ahead(std::size_t next, int cell);
  /// The next step, where its first collective was launched ahead; else null.
  std::unique_ptr<StepRun> take_ahead() { return std::move(ahead_); }

 private:
  /// The next step, if its backward begins by launching a collective.
  struct Candidate {
    std::size_t at = 0;                     // the instruction to come when this was looked up
    std::unique_ptr<StepRun> step;          // null: there is no such step
    std::optional<StageResult> input = {};  // that its backward takes; none on the last stage
    int transfer = -1;                      // that brings it; -1: it is made on this rank
  };
  DUALPIPE_DECL Candidate next_backward(std::size_t next, int cell);
  /// The input is in the mailbox afterwards. False: it has not come yet; nothing was waited for.
  DUALPIPE_DECL bool bring_input(const Candidate& candidate);

  RunContext& context_;
  Transfers& transfers_;
  std::unique_ptr<StepRun> trailing_;
  std::unique_ptr<StepRun> ahead_;
  Candidate candidate_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/overlap.ipp"
#endif
