#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/render.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::plan {
namespace {

struct Options {
  std::string trace;
  OutputOptions output;
};

std::string report_trace(const Options& options) {
  const std::string json_text = read_file(options.trace);
  Timeline timeline;
  try {
    timeline = from_trace(json_text);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(options.trace + ": " + error.what());
  }
  if (options.output.format == "svg") return to_svg({timeline});
  const Report result = report(timeline);
  return options.output.format == "json" ? json(result, true) : text(result, timeline.seconds_per_unit);
}

}  // namespace

void add_report(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("report", "makespan, bubble, activations and hidden communication of a recorded trace");
  auto options = std::make_shared<Options>();
  command.add_option("trace", options->trace, "trace file (JSON), as simulate --format trace or a run writes it")
      ->required()
      ->option_text("FILE");
  add_output(command, options->output, {"text", "json", "svg"});
  command.callback([options] { write_output(report_trace(*options), options->output.path); });
}

}  // namespace dualpipe::plan
