#include "tools/plan/costs.hpp"

namespace dualpipe::plan {

Costs CostOptions::all() const {
  return {.forward = costs[0], .backward = costs[1], .weight = costs[2], .pair = costs[3], .send = send};
}

void add_costs(CLI::App& command, CostOptions& costs) {
  command
      .add_option("--costs", costs.costs,
                  "durations of a forward, a backward, its weight part, and an overlapped pair (default: 1,2,1,3)")
      ->delimiter(',')
      ->option_text("F,B,W,FB");
  command.add_option("--send", costs.send, "duration of a transfer between two ranks")->capture_default_str();
}

}  // namespace dualpipe::plan
