#pragma once

#include <vector>

#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe {

/// One instruction of a rank's program.
struct Instruction {
  enum class Do {
    receive,  ///< post `transfer`'s receive
    wait,     ///< `transfer` has arrived from here on
    compute,  ///< run `step`
    send,     ///< hand `transfer` to the communicator; where it follows its producing step it may be issued inside, once it is ready
    release,  ///< drop the sent tensors of `transfer`: the receiver is known to have taken them, or enough later ones are in flight
  };
  Do what = Do::compute;
  int transfer = -1;  ///< index into Program::order, all but compute
  Step step;          ///< compute only
  bool operator==(const Instruction&) const = default;
};

/// What actually runs: one global order of all boundary transfers, and for each rank its instructions, which issue the rank's own
/// transfers in that order.
struct Program {
  std::vector<Transfer> order;
  std::vector<std::vector<Instruction>> ranks;
};

/// @throws InvalidArgument  as simulate does.
Program lower(const Schedule& schedule, Publish publish = Publish::early);

/// Executes the programs of all ranks with one blocking transfer at a time per rank: a rank that reaches a send or receive waits until
/// the other end reaches it too.
///
/// @throws InvalidArgument  if not all ranks reach their end, naming where each is stuck.
void dry_run(const Program& program);

}  // namespace dualpipe
