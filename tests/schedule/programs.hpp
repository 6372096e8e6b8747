#pragma once

// What the tests of lower and dry_run share.

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/lower.hpp"

namespace dualpipe {

/// Training and forward-only schedules of every kind and many sizes.
inline void for_each_schedule(int max_ranks, const std::function<void(const Schedule&)>& visit) {
  for (const std::string& kind : schedule_kinds())
    for (int ranks = 2; ranks <= max_ranks; ++ranks) {
      if (kind == "dualpipe" && ranks % 2 == 1) continue;
      for (const int micro_batches : {2 * ranks, 4 * ranks}) {
        SCOPED_TRACE(detail::str(kind, ", ", ranks, " ranks, ", micro_batches, " micro-batches"));
        const Schedule schedule = make_schedule({kind, ranks, micro_batches});
        visit(schedule);
        visit(forward_only(schedule, micro_batches - 1));
      }
    }
}

inline bool is_transfer(const Instruction& instruction) {
  return instruction.what == Instruction::Do::send || instruction.what == Instruction::Do::receive;
}

}  // namespace dualpipe
