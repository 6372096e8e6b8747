#pragma once

#include <string>
#include <vector>

#include "dualpipe/planner/memory.hpp"
#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe::planner {

/// What a model costs, stage by stage: time and memory.
struct CostModel {
  Costs time;
  MemoryCosts memory;
  std::vector<StageSize> sizes = {};  ///< of each stage; empty: not known
  bool operator==(const CostModel&) const = default;
};

struct MeasuredCosts {
  Costs costs;                     ///< with `stages`, `pairs` and `sends`, and the trace's unit
  std::vector<StageSize> sizes;    ///< of each stage; empty: the trace does not say
  std::vector<std::string> notes;  ///< what the trace did not show, and what was taken in its place
};

/// What a recorded training step cost: medians for each stage and pass, for each pair of stages, and for each boundary
/// and link. A transfer lasts from when both of its ends had begun it until it arrived, so waiting for the sender does
/// not count. A pass that a stage did not run by itself is taken from the other stages; a weight part that no stage ran
/// by itself is half of the backward. The first of several steps is left out, as it warms up. A trace may hold several
/// pipelines side by side: they are measured together, and ranks count within a pipeline.
///
/// @throws InvalidArgument  no training step, or one where some stage does nothing.
MeasuredCosts measure_costs(const Timeline& trace);

/// The same model whose stages are computed again before their backward (Stage::recompute): each backward, and each pair,
/// takes another forward.
///
/// @param kept  see MemoryCosts.
CostModel recomputed(CostModel model, double kept);

/// The parameters of all stages that each rank holds; empty where sizes are not known.
std::vector<double> parameters_of_ranks(const Schedule& schedule, const std::vector<StageSize>& sizes);

/// The same model cut into another number of equally long stages. Half a stage takes half the time and memory. Old
/// boundaries that remain keep their transfer times, links keep theirs, new boundaries take `send`. Pairs keep the
/// share that overlapping saves on average. What stays of an activation that is computed again stays as large.
///
/// @param described  how many stages the costs describe, if they do not list them.
/// @throws InvalidArgument  lists of another length than `described`.
CostModel spread(const CostModel& model, int described, int num_stages);

}  // namespace dualpipe::planner
