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
    reduce,   ///< begin the sum of gradients that `transfer` says; all of them are over at the end of the program
  };
  Do what = Do::compute;
  int transfer = -1;  ///< index into Program::order; of a reduce, into Program::reductions; of a compute, -1
  Step step;          ///< compute only
  bool operator==(const Instruction&) const = default;
};

/// The sum of a stage's gradients over all ranks that hold it. Where several replicas of the pipeline train one model, it
/// is one sum over these ranks of all replicas.
struct Reduction {
  int stage = 0;
  std::vector<int> ranks;  ///< of one pipeline, ascending
  int behind = 0;          ///< how many transfers of Program::order come before it in the global order
  bool operator==(const Reduction&) const = default;
};

/// What actually runs: one global order of all boundary transfers and sums of gradients, and for each rank its
/// instructions, which issue the rank's own ones in that order.
///
/// The order is that of the times at which they become ready in a simulation where everything takes time; a sum becomes
/// ready when the last of its ranks has run its last weight part of the stage. Along any chain of dependencies these
/// times rise strictly, so whatever a rank has to finish before it reaches one of its transfers or sums needs only such
/// that come earlier in the order. The earliest unfinished one is therefore always reached by all its ranks: no program
/// deadlocks, even if each rank performs one of them at a time and waits for it, and whatever computing really costs.
/// All replicas of a pipeline run the same program, so this holds for all of them together: what a rank of one reaches,
/// the ranks at its place in the others reach too.
///
/// A rank's instructions are, for each step: the waits for what it needs, `compute`, and directly behind it the sends
/// and receives that follow it in the order. The sends there are the step's own; an executor issues them from inside
/// the step as soon as their tensors exist, and walks on over what follows up to the next wait, compute, release or
/// reduce. A reduce stands behind the last step that has ended when the sum is ready, so that no rank waits long for the
/// others: on a device, what waits occupies it.
struct Program {
  std::vector<Transfer> order;
  std::vector<Reduction> reductions;  ///< in the order in which all ranks begin theirs
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
/// @param ready         where pairs have their results; the results of one pair are sent in that order.
/// @param num_replicas  pipelines that train one model together: the gradients of each stage that several ranks hold, in
///                      all replicas, are summed. 0: the program leaves the sums out.
/// @param held_as       says which ranks hold a stage, where some of them may run it for no micro-batch; null: `schedule`.
/// @throws InvalidArgument  as simulate does.
DUALPIPE_DECL Program lower(const Schedule& schedule, Publish publish = Publish::early, const PairReady& ready = {},
                            int num_replicas = 0, const Schedule* held_as = nullptr);

/// Executes the programs of all ranks with one blocking transfer at a time per rank: a rank that reaches a send or
/// receive waits until the other end reaches it too, one that reaches a reduce until all its ranks do. Linear in the
/// number of instructions.
///
/// @throws InvalidArgument  if not all ranks reach their end, naming where each is stuck; if a rank computes something
/// before its inputs
///     are there or sends it before it is computed; if a transfer is not sent, received, waited for and released
///     exactly once by the ranks that it names, in this sequence; if a sum is not begun exactly once by each of its
///     ranks, behind the last weight part of its stage there; or if a rank leaves the global order.
DUALPIPE_DECL void dry_run(const Program& program);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/dry_run.ipp"
#include "dualpipe/detail/schedule/lower.ipp"
#endif
