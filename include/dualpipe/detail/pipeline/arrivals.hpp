#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/schedule/lower.hpp"

namespace dualpipe {

/// What the transfers of a plan bring to one rank, as far as that is known before they come.
struct Arrivals {
  /// The first stage whose shapes depend on data; max: none.
  int data_dependent_from = std::numeric_limits<int>::max();
  std::vector<std::optional<Signature>> signatures = {};  ///< by number of the transfer in the program's order

  /// The stage whose outputs have the shapes of what is transferred.
  static int shaped_by(const Transfer& transfer) {
    return transfer.payload == Payload::activation ? transfer.stage : transfer.stage - 1;
  }
  /// What came once comes again: no stage up to there has shapes that depend on data.
  bool recurs(const Transfer& transfer) const { return shaped_by(transfer) < data_dependent_from; }
};

}  // namespace dualpipe
