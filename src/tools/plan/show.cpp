#include <unistd.h>
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
  std::string color = "auto";
  OutputOptions output;
};

std::string show(const Options& options) {
  const Schedule plan = schedule(options.schedule);
  if (options.output.format == "csv") return to_csv(plan);
  if (options.output.format == "json") return json(plan);
  const Timeline timeline = simulate(plan, options.costs.all(), options.publish).timeline;
  if (options.output.format == "svg") return to_svg({timeline});
  const bool terminal = options.output.path.empty() && ::isatty(STDOUT_FILENO) == 1;
  const bool color = options.color == "always" || (options.color == "auto" && terminal);
  return describe(plan) + "; " + describe(options.costs.all(), options.publish) + "\n" + to_ascii(timeline, color) +
         summary(report(timeline));
}

}  // namespace

void add_show(CLI::App& app) {
  CLI::App& command = *app.add_subcommand(
      "show", "draw a schedule, or write it as CSV in the text form of torch.distributed.pipelining");
  auto options = std::make_shared<Options>();
  add_schedule(command, options->schedule);
  add_output(command, options->output, {"ascii", "csv", "svg", "json"});
  add_costs(command, options->costs);
  add_publish(command, options->publish);
  command.add_option("--color", options->color, "colours in ascii; auto: on a terminal")
      ->check(CLI::IsMember({"auto", "always", "never"}).description(""))
      ->option_text("auto|always|never");
  command.callback([options] { write_output(show(*options), options->output.path); });
}

}  // namespace dualpipe::plan
