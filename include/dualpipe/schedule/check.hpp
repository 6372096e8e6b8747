#pragma once

#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe {

/// One finding about a schedule.
struct Violation {
  int rank = -1;  ///< -1: about the schedule as a whole
  int cell = -1;  ///< index into ranks[rank] (texts count from 1), -1: about the whole rank
  std::string message;
};

/// "rank 1, cell 3: 0F1 is missing"
DUALPIPE_DECL std::string to_string(const Violation& violation);

/// What keeps the schedule from being run, empty if nothing does. Looks for: each stage and micro-batch having F once
/// and either B once or I and W once each, all on one rank; a forward before its backward and I before W; pairs of a
/// forward and a B or I; and executability across ranks, where the finding spells the cycle out: which rank waits for
/// what from whom. Order is looked at once the schedule is complete, executability once it is in order.
///
/// Time and memory are linear in the number of ops. Of many findings, on one rank or on all together, the first few are
/// listed, the rest counted.
DUALPIPE_DECL std::vector<Violation> violations(const Schedule& schedule);

/// @throws InvalidArgument  with the first finding, the number of further ones, and the cells around it.
DUALPIPE_DECL void check(const Schedule& schedule);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/check.ipp"
#endif
