#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/planner/memory.hpp"
#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe {

/// What a model costs, stage by stage: time and memory.
struct CostModel {
  Costs time;
  MemoryCosts memory;
  bool operator==(const CostModel&) const = default;
};

/// Reads a costs file. All keys may be absent: a backward then takes two forwards, the weight part half of that, a pair
/// as long as both; a stage is like the model. No key "stages" means that all stages are alike.
///
///     {"forward": 1, "backward": 2, "weight": 1, "pair": 3, "send": 0.1,
///      "pair_ready": {"activation": 0.7, "gradient": 0.5},
///      "memory": {"activation": 1, "weight": 0.2, "state": 6},
///      "stages": [{"forward": 1.3, "memory": {"state": 9}}, {}, {}, {"forward": 1.5, "backward": 3}],
///      "pairs": [{"forward": 0, "backward": 3, "duration": 3.2}],
///      "sends": [{"boundary": 1, "duration": 0.2}, {"ranks": [1, 2], "duration": 0.5}],
///      "slowdown": [1, 1, 1.2, 1],
///      "seconds_per_unit": 0.001}
///
/// @throws InvalidArgument  naming the place: no JSON, an unknown or repeated key, a value that is no number, negative,
/// beyond a double, or zero where something that takes no time makes no sense (forward, backward, pair).
CostModel read_costs(std::string_view json);

/// What read_costs reads, exactly; everything is written out.
std::string to_json(const CostModel& model);

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

}  // namespace dualpipe
