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
  int replicas = 0;
  OutputOptions output;
};

std::string lower_and_print(const LowerOptions& options) {
  const Program program = lower(schedule(options.schedule), options.publish, {}, options.replicas);
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
  command
      .add_option("--replicas", options->replicas,
                  "with the sums of gradients, over this many pipelines that train one model; 0: without")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.callback([options] { write_output(lower_and_print(*options), options->output.path); });
}

}  // namespace dualpipe::planner::tool
