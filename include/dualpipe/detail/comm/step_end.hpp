#pragma once

#include <algorithm>
#include <set>
#include <string>
#include <utility>
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

/// The end of a step that is open.
///
/// @param missing  ranks whose votes have not come.
/// @param left     ranks that have left.
inline StepEnd open_step(std::vector<int> missing, const std::set<int>& left) {
  const auto living = std::partition(missing.begin(), missing.end(), [&](int member) { return left.contains(member); });
  const bool has_left = living != missing.begin();
  return {.outcome = StepOutcome::open, .ballots = {}, .missing = std::move(missing), .has_left = has_left};
}

}  // namespace dualpipe::detail
