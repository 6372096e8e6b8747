#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"

namespace dualpipe::detail {

/// What a rank does, as it tells another that waits for it.
struct RankActivity {
  std::vector<int> waits_for;  ///< ranks; empty: for nobody, it runs code of its own
  std::string operation;       ///< in which it waits, or has waited last; may be empty
  double seconds = 0;          ///< for so long
};

/// Why a rank waits in vain.
struct Culprit {
  int rank = 0;
  std::string chain;  ///< "; rank 1 waits for rank 2 in …; rank 2 …"
};

/// Follows who waits for whom, from the ranks for which this one waits to one that waits for nobody, or does not answer.
///
/// @param ask  what a rank does; nothing if it does not answer.
DUALPIPE_DECL Culprit find_culprit(int rank, const std::vector<int>& waits_for,
                                   const std::function<std::optional<RankActivity>(int)>& ask);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/comm/activity.ipp"
#endif
