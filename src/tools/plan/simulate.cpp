#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "dualpipe/schedule/render.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/costs.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::plan {
namespace {

struct Options {
  ScheduleSpec schedule;
  CostOptions costs;
  Publish publish = Publish::early;
  OutputOptions output;
};

std::string simulate_and_print(const Options& options) {
  const Schedule plan = schedule(options.schedule);
  const Timeline timeline = simulate(plan, options.costs.all(), options.publish).timeline;
  if (options.output.format == "svg") return to_svg({timeline});
  if (options.output.format == "trace") return to_trace(timeline);
  const Report result = report(timeline);
  if (options.output.format == "json") return json(result);
  return describe(plan) + "; " + describe(options.costs.all(), options.publish) + "\n" + text(result, 0);
}

}  // namespace

void add_simulate(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("simulate", "run a schedule with given costs: makespan, bubble and activations of each rank");
  auto options = std::make_shared<Options>();
  add_schedule(command, options->schedule);
  add_output(command, options->output, {"text", "json", "svg", "trace"});
  add_costs(command, options->costs);
  add_publish(command, options->publish);
  command.callback([options] { write_output(simulate_and_print(*options), options->output.path); });
}

}  // namespace dualpipe::plan
