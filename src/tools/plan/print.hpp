#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "dualpipe/planner/cost_model.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/simulate.hpp"

// What dualpipe-plan prints. Texts and JSON end in a newline.
namespace dualpipe::planner::tool {

/// On one line; what is no UTF-8 is replaced.
std::string dumped(const nlohmann::ordered_json& value);

/// Number and unit: of what is measured to a hundredth of a millisecond, or to a millisecond from ten seconds on.
std::string time(double value, double seconds_per_unit);

/// "dualpipe: 8 ranks, 8 stages, 20 micro-batches"
std::string describe(const Schedule& schedule);

/// "4.8 %"
std::string percent(double part, double whole);

/// "812", "1.5 M": at most three digits before the unit.
std::string amount(double value);

/// A table with a row for each stage: ranks that hold it, parameters, memory. Empty where the model says nothing of
/// single stages.
std::string text_of_stages(const Schedule& schedule, const CostModel& model);
/// [{"stage":…,"ranks":[…],"parameters":…,"bytes":…,"state":…},…], members that are known; null as above.
nlohmann::ordered_json json_of_stages(const Schedule& schedule, const CostModel& model);

/// Columns aligned to the right.
std::string table(const std::vector<std::vector<std::string>>& rows);

/// "makespan 63, bubble 3 (4.8 %) on the worst rank, at most 9 activations held on a rank"
std::string summary(const Report& report, double seconds_per_unit = 0);

/// {"name":…,"num_stages":…,"num_micro_batches":…,"ranks":[["0F0",…],…]}
std::string json(const Schedule& schedule);

/// {"order":[{"payload":…,"stage":…,"micro_batch":…,"from":…,"to":…},…],"ranks":[[{"do":…,"transfer":…} or
/// {"do":"compute","step":…},…],…]}
std::string json(const Program& program);
std::string text(const Program& program);

/// Of a simulation: {"makespan":…,"ranks":[{"rank":…,"busy":…,"bubble":…,"peak_activations":…},…]}
nlohmann::ordered_json json_of(const Report& report);
/// A table with a row per rank, then the summary; in seconds where `seconds_per_unit` is not 0. Communication appears
/// where there is any.
std::string text(const Report& report, double seconds_per_unit);

}  // namespace dualpipe::planner::tool
