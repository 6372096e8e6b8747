#pragma once

#include <limits>
#include <optional>
#include <unordered_map>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/schedule/lower.hpp"

namespace dualpipe::detail {

/// What one rank knows of a plan's transfers before they come.
struct Arrivals {
  /// The first stage whose shapes depend on data; max: none.
  int data_dependent_from = std::numeric_limits<int>::max();
  std::unordered_map<int, std::optional<Signature>> signatures =
      {};  ///< by index of the transfer in the program's order

  /// The stage whose outputs have the shapes of what is transferred.
  static int shaped_by(const Transfer& transfer) { return boundary_of(transfer.payload, transfer.stage); }
  /// True if the transfer always brings the same signature: no stage up to its sender has shapes that depend on data.
  bool recurs(const Transfer& transfer) const { return shaped_by(transfer) < data_dependent_from; }
};

}  // namespace dualpipe::detail
