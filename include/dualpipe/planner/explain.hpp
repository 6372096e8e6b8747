#pragma once

#include <string>
#include <vector>

#include "dualpipe/planner/render.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe::planner {

/// One of the eight steps of DualPipe or DualPipeV on one rank.
struct Section {
  int number = 0;          ///< 1 to 8
  int begin = 0, end = 0;  ///< which of ranks[r], [begin, end)
  bool operator==(const Section&) const = default;
};

/// For each rank its steps, in order. The innermost ranks have no steps 1, 3, 5 and 7.
///
/// @throws InvalidArgument  the schedule is neither what make_schedule gives for dualpipe nor for dualpipev.
std::vector<std::vector<Section>> eight_steps(const Schedule& schedule);

/// The steps in a timeline of the schedule, from the begin of their first op to the end of their last, with their
/// numbers as text; for PictureOptions. @throws InvalidArgument  as eight_steps, or the timeline lacks ops of it.
std::vector<Mark> step_marks(const Schedule& schedule, const Timeline& timeline);

/// One line on what each step does, "1  F0 x 6 …", with how often it is repeated on rank 0 and on the innermost rank.
///
/// @throws InvalidArgument  as eight_steps does.
std::vector<std::string> step_notes(const Schedule& schedule);

}  // namespace dualpipe::planner
