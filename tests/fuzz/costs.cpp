// Costs from JSON: what is read is written back the same, and either a schedule runs with it or is refused with a
// message; the bound of a search is never above what it finds.
#include <cmath>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/cost_file.hpp"
#include "dualpipe/planner/cost_model.hpp"
#include "dualpipe/planner/search.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "fuzz/target.hpp"

namespace dualpipe::fuzz {
namespace {

void use(const planner::CostModel& model) {
  constexpr std::size_t most_stages = 6;
  if (model.time.stages.size() > most_stages) return;
  const int stages = model.time.stages.empty() ? 4 : static_cast<int>(model.time.stages.size());
  for (const char* kind : {"dualpipe", "1f1b"}) {
    const ScheduleSpec spec{kind, stages, 6};
    const planner::SearchResult found = planner::search(spec, model, {.evaluations = 20});
    require(std::isfinite(found.makespan), "a makespan is a number");
    require(found.bound.makespan <= found.makespan * (1 + 1e-9), "no order is faster than the bound");
  }
  planner::spread(model, stages, 2 * stages);
}

}  // namespace

void read(std::string_view text) {
  planner::CostModel model;
  try {
    model = planner::read_costs(text);
  } catch (const InvalidArgument& error) {
    return require_readable(error.what());
  }
  require(planner::read_costs(planner::to_json(model)) == model,
          "what was read is written so that it is read the same");
  try {
    use(model);
  } catch (const InvalidArgument& error) {
    require_readable(error.what());
  }
}

}  // namespace dualpipe::fuzz
