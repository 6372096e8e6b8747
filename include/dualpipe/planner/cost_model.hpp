#pragma once

#include <string>
#include <vector>

#include "dualpipe/planner/memory.hpp"
#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe::planner {

/// What a model costs, stage by stage: time and memory.
struct CostModel {
  Costs time;
  MemoryCosts memory;
  bool operator==(const CostModel&) const = default;
};

struct MeasuredCosts {
  Costs costs;                     ///< with `stages`, `pairs` and `sends`, and the trace's unit
  std::vector<std::string> notes;  ///< what the trace did not show, and what was taken in its place
};

/// What a recorded training step cost: medians for each stage and pass, for each pair of stages, and for each boundary
/// and link. A transfer takes the time from when both of its ends were there until it arrived: a receive that waits for
/// its sender has not been slow. What a stage did not show is taken from the others, as its weight part, where no
/// backward ran in two parts, is half of it. Of several steps the first, which warms up, does not count.
/// A trace may be of several pipelines side by side: they are taken together, and ranks count within a pipeline.
///
/// @throws InvalidArgument  no training step, or one where some stage does nothing.
MeasuredCosts measure_costs(const Timeline& trace);

/// The same model cut into another number of equally long stages: each gets its stretch of the old ones, so half a
/// stage takes half the time and memory. Boundaries that fall together keep their transfers, links their times, new
/// boundaries take `send`; pairs keep what overlapping saves on average.
///
/// @param described  how many stages the costs are of, where they do not list them.
/// @throws InvalidArgument  lists of another length than `described`.
CostModel spread(const CostModel& model, int described, int num_stages);

}  // namespace dualpipe::planner
