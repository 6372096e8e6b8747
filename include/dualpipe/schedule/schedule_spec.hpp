#pragma once

#include <string>

namespace dualpipe {

/// Which schedule, and how large.
struct ScheduleSpec {
  std::string kind = "dualpipe";  ///< one of schedule_kinds()
  int num_ranks = 0;
  int num_micro_batches = 0;
  int chunks_per_rank = 2;  ///< interleaved only: stages on each rank
};

}  // namespace dualpipe
