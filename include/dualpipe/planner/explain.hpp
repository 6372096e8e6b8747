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

/// For each rank the steps that it has, in order; outer ranks lack none, inner ones lack 1, 3, 5 and 7.
///
/// @throws InvalidArgument  the schedule is neither what make_schedule gives for dualpipe nor for dualpipev.
std::vector<std::vector<Section>> eight_steps(const Schedule& schedule);

/// Where they are in a timeline of the schedule, each from the begin of its first op to the end of its last, with its
/// number as text; for PictureOptions. @throws InvalidArgument  as eight_steps, or the timeline lacks ops of it.
std::vector<Mark> step_marks(const Schedule& schedule, const Timeline& timeline);

/// One line on what each step does, "1  F0 x 6 …", with how often it is repeated on rank 0 and on the innermost rank.
///
/// @throws InvalidArgument  as eight_steps does.
std::vector<std::string> step_notes(const Schedule& schedule);

}  // namespace dualpipe::planner
