#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/simulate.hpp"

// Options that several subcommands share. The `add` functions bind to their argument, which must live as long as the
// command does.
namespace dualpipe::planner::tool {

/// "dualpipe, dualpipev, …"
std::string kinds();

/// --schedule (a kind or the path of a CSV file), --ranks, --microbatches, --chunks.
void add_schedule(CLI::App& command, ScheduleSpec& spec);

/// From a generator, or from a file, which may be anything that can be read.
///
/// @throws CLI::ValidationError  numbers that a kind needs are missing.
/// @throws InvalidArgument  as make_schedule and from_csv do, with the file's name.
Schedule unchecked_schedule(const ScheduleSpec& spec);
/// The same, checked.
Schedule schedule(const ScheduleSpec& spec);

/// --publish early|atomic
void add_publish(CLI::App& command, Publish& publish);

struct OutputOptions {
  std::string format;  ///< empty: the command's first
  std::string path;    ///< empty: standard output
};
/// --output, and --format where there is a choice.
void add_output(CLI::App& command, OutputOptions& output, const std::vector<std::string>& formats);

}  // namespace dualpipe::planner::tool
