#pragma once

#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/transfer.hpp"

namespace dualpipe {

/// One instruction of a rank's program.
struct Instruction {
  enum class Do {
    receive,  ///< post `transfer`'s receive
    wait,     ///< `transfer` has arrived from here on
    compute,  ///< run `step`
    send,     ///< hand `transfer` to the communicator; where it follows its producing step it may be issued inside,
              ///< once it is ready
    release,  ///< wait until `transfer` is done and drop its sent tensors
  };
  Do what = Do::compute;
  int transfer = -1;  ///< index into Program::order, all but compute
  Step step;          ///< compute only
  bool operator==(const Instruction&) const = default;
};

/// What actually runs: one global order of all boundary transfers, and for each rank its instructions, which issue the
/// rank's own transfers in that order.
///
/// The order is that of the times at which the transfers become ready in a simulation where everything takes time.
/// Along any chain of dependencies these times rise strictly, so whatever a rank has to finish before it reaches one of
/// its transfers needs only transfers that come earlier in the order. The earliest unfinished transfer is therefore
/// always reached by both of its ends: no program deadlocks, even if each rank performs one blocking transfer at a time
/// and whatever computing really costs.
///
/// A rank's instructions are, for each step: the waits for what it needs, `compute`, and directly behind it the sends
/// and receives that follow it in the order. The sends there are the step's own; an executor issues them from inside
/// the step as soon as their tensors exist, and walks on over what follows up to the next wait, compute or release.
struct Program {
  std::vector<Transfer> order;
  std::vector<std::vector<Instruction>> ranks;
};

/// A receive is posted as early as the order allows, but at most this many steps lie between it and the step that needs
/// it, unless the order forces it further ahead: memory for what has arrived does not grow with the number of
/// micro-batches.
inline constexpr int max_steps_ahead = 8;

/// A send is released directly behind the first wait that proves that its receiver has taken it, because the message
/// waited for was sent, perhaps by way of other ranks, after the receiver had begun the step that needed it; releasing
/// then costs no time. Where nothing flows back (forward only), it is released after the step that issued this many
/// later sends to the same rank; what is left, at the end.
inline constexpr int max_unreleased_sends = 8;

/// Takes training and forward-only schedules. What stays on its rank is no transfer.
///
/// @param ready  where pairs have their results; the results of one pair are sent in that order.
/// @throws InvalidArgument  as simulate does.
DUALPIPE_DECL Program lower(const Schedule& schedule, Publish publish = Publish::early, const PairReady& ready = {});

/// Executes the programs of all ranks with one blocking transfer at a time per rank: a rank that reaches a send or
/// receive waits until the other end reaches it too. Linear in the number of instructions.
///
/// @throws InvalidArgument  if not all ranks reach their end, naming where each is stuck; if a rank computes something
/// before its inputs
///     are there or sends it before it is computed; if a transfer is not sent, received, waited for and released
///     exactly once by the ranks that it names, in this sequence; or if a rank leaves the global order.
DUALPIPE_DECL void dry_run(const Program& program);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/dry_run.ipp"
#include "dualpipe/detail/schedule/lower.ipp"
#endif
