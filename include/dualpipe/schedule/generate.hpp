#pragma once

#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe {

struct ScheduleSpec {
  std::string kind = "dualpipe";  ///< one of schedule_kinds()
  int num_ranks = 0;
  int num_micro_batches = 0;
  int chunks_per_rank = 2;  ///< interleaved only: stages on each rank
};

/// "dualpipe", "dualpipev", "1f1b", "zb1p", "gpipe", "interleaved", "zbv".
DUALPIPE_DECL const std::vector<std::string>& schedule_kinds();

/// @throws InvalidArgument  a kind, number of ranks or of micro-batches that is not supported; the text names what
/// would work.
DUALPIPE_DECL Schedule make_schedule(const ScheduleSpec& spec);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/generate.ipp"
#endif
