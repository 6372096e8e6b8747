// Runs as lines of JSON: read with ascending steps and as many values as steps, and drawn, or refused.
#include "dualpipe/planner/run_log.hpp"

#include "dualpipe/error.hpp"
#include "fuzz/target.hpp"

namespace dualpipe::fuzz {

void read(std::string_view text) {
  try {
    const planner::RunLog log = planner::read_run_log(text, "run");
    for (std::size_t i = 1; i < log.steps.size(); ++i) require(log.steps[i - 1] < log.steps[i], "steps ascend");
    for (const auto& [name, values] : log.values)
      require(values.size() == log.steps.size(), "every step has a value or a gap");
    const std::string svg = planner::to_svg({log});
    require(svg.find("nan") == std::string::npos && svg.find("inf") == std::string::npos, "places are numbers");
  } catch (const InvalidArgument& error) {
    require_readable(error.what());
  }
}

}  // namespace dualpipe::fuzz
