#pragma once

#include <string>
#include <vector>

#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe {

/// One finding about a schedule.
struct Violation {
  int rank = -1;  ///< -1: about the schedule as a whole
  int cell = -1;  ///< index into ranks[rank], -1: about the whole rank
  std::string message;
};

/// What keeps the schedule from being run, empty if nothing does. Looks for: each stage and micro-batch having F once
/// and either B once or I and W once each, all on one rank; a forward before its backward and I before W; and
/// executability across ranks, where the finding spells the cycle out: which rank waits for what from whom. Linear in
/// the number of ops.
std::vector<Violation> violations(const Schedule& schedule);

/// @throws InvalidArgument  with the findings and the cells around the first one.
void check(const Schedule& schedule);

}  // namespace dualpipe
