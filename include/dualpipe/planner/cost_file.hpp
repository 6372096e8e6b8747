#pragma once

#include <string>
#include <string_view>

#include "dualpipe/planner/cost_model.hpp"

namespace dualpipe::planner {

/// Reads a costs file. All keys may be absent: a backward then takes two forwards, the weight part half of that, a pair
/// as long as both; a stage is like the model. No key "stages" means that all stages are alike.
///
///     {"forward": 1, "backward": 2, "weight": 1, "pair": 3, "send": 0.1,
///      "pair_ready": {"activation": 0.7, "gradient": 0.5},
///      "memory": {"activation": 1, "weight": 0.2, "state": 6},
///      "stages": [{"forward": 1.3, "memory": {"state": 9}, "parameters": 5e6, "bytes": 1e7},
///                 {}, {}, {"forward": 1.5, "backward": 3}],
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

}  // namespace dualpipe::planner
