#pragma once

#include <string>

#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "dualpipe/schedule/timeline.hpp"

// What dualpipe-plan prints. Everything ends in a newline.
namespace dualpipe::plan {

/// "dualpipe: 8 ranks, 8 stages, 20 micro-batches"
std::string describe(const Schedule& schedule);

/// "F=1 B=2 W=1 pair=3 send=0, results published early"
std::string describe(const Costs& costs, Publish publish);

/// "makespan 63, bubble 3 (4.8 %) and 9 activations on the worst rank"
std::string summary(const Report& report, double seconds_per_unit = 0);

/// {"name":…,"num_stages":…,"num_micro_batches":…,"ranks":[["0F0",…],…]}
std::string json(const Schedule& schedule);

/// {"order":[{"payload":…,"stage":…,"micro_batch":…,"from":…,"to":…},…],"ranks":[[{"do":…,"transfer":…} or
/// {"do":"compute","step":…},…],…]}
std::string json(const Program& program);
std::string text(const Program& program);

/// {"makespan":…,"ranks":[{"rank":…,"busy":…,"bubble":…,"peak_activations":…},…]}; `transfers` adds "communication" and
/// "hidden".
std::string json(const Report& report, bool transfers);
/// A table with a row per rank; in seconds where `seconds_per_unit` is not 0.
std::string text(const Report& report, double seconds_per_unit);

}  // namespace dualpipe::plan
