#pragma once

#include <optional>
#include <string>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/schedule/cell_table.hpp"
#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe::detail {

/// Ranks that wait for each other in a cycle.
struct Deadlock {
  CellPlace place;    ///< of one of them
  std::string cycle;  ///< which rank waits for what from whom
};

/// Nothing if all ranks reach their end.
///
/// @param schedule  complete, and in order on each rank.
/// @param cells     of all its ops.
DUALPIPE_DECL std::optional<Deadlock> find_deadlock(const Schedule& schedule, const CellTable& cells);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/deadlock.ipp"
#endif
