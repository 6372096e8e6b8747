#pragma once

#include <CLI/CLI.hpp>

// The subcommands of dualpipe-plan, a file each. Every function adds one to `app`, with its options; CLI11 runs the
// chosen one at the end of parsing. What it throws passes through to main, which prints it.
namespace dualpipe::planner::tool {

void add_show(CLI::App& app);
void add_check(CLI::App& app);
void add_lower(CLI::App& app);
void add_simulate(CLI::App& app);
void add_compare(CLI::App& app);
void add_search(CLI::App& app);
void add_cost_file(CLI::App& app);
void add_report(CLI::App& app);
void add_plot(CLI::App& app);

}  // namespace dualpipe::planner::tool
