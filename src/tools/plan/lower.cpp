#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "dualpipe/schedule/lower.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::planner::tool {
namespace {

struct LowerOptions {
  ScheduleSpec schedule;
  Publish publish = Publish::early;
  OutputOptions output;
};

std::string lower_and_print(const LowerOptions& options) {
  const Program program = lower(schedule(options.schedule), options.publish);
  dry_run(program);
  return options.output.format == "json" ? json(program) : text(program);
}

}  // namespace

void add_lower(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("lower", "print what runs: the global order of transfers and the instructions of each rank");
  auto options = std::make_shared<LowerOptions>();
  add_schedule(command, options->schedule);
  add_output(command, options->output, {"text", "json"});
  add_publish(command, options->publish);
  command.callback([options] { write_output(lower_and_print(*options), options->output.path); });
}

}  // namespace dualpipe::planner::tool
