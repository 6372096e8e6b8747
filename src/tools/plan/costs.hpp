#pragma once

#include <CLI/CLI.hpp>
#include <array>

#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::plan {

struct CostOptions {
  std::array<double, 4> costs{1, 2, 1, 3};
  double send = 0;

  Costs all() const;
};

/// --costs and --send. Binds to `costs`, which must live as long as the command does.
void add_costs(CLI::App& command, CostOptions& costs);

}  // namespace dualpipe::plan
