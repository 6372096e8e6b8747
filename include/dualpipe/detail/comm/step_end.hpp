#pragma once

#include <string>
#include <vector>

namespace dualpipe::detail {

enum class StepOutcome {
  open,
  over,         ///< all ranks of the group are through with the step
  rolled_back,  ///< none is
  unknown,      ///< the others may have decided without this rank
};

/// What a rank knows of the end of a step for which it has voted.
struct StepEnd {
  StepOutcome outcome = StepOutcome::open;
  std::vector<std::string> ballots;  ///< over: by rank in the group
  std::vector<int> missing;          ///< open: ranks whose votes have not come, first those that have left
  bool has_left = false;             ///< the first of `missing`: its vote will not come
};

}  // namespace dualpipe::detail
