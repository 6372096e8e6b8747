#include <CLI/CLI.hpp>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/planner/run_log.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"

namespace dualpipe::planner::tool {
namespace {

std::string plot(const std::vector<std::string>& paths) {
  std::vector<RunLog> runs;
  std::map<std::string, int> uses;
  for (const std::string& path : paths) {
    runs.push_back(read_run_log(detail::read_file(path), path));
    ++uses[std::filesystem::path(path).stem().string()];
  }
  for (RunLog& run : runs)
    if (const std::string stem = std::filesystem::path(run.name).stem().string(); uses[stem] == 1) run.name = stem;
  return to_svg(runs);
}

}  // namespace

void add_plot(CLI::App& app) {
  struct PlotOptions {
    std::vector<std::string> runs;
    OutputOptions output;
  };
  CLI::App& command =
      *app.add_subcommand("plot", "draw loss, learning rate and gradient norm of runs over their steps, as SVG");
  auto options = std::make_shared<PlotOptions>();
  command.add_option("run", options->runs, "what runs wrote, a JSON object per step on each line; all in one picture")
      ->required()
      ->option_text("FILE...");
  add_output(command, options->output, {"svg"});
  command.footer(
      "Lines are as {\"step\": 12, \"loss\": 1.5, \"learning_rate\": 0.001, \"gradient_norm\": 0.7}. Steps ascend; "
      "other "
      "members\nare numbers or null, and those that are not drawn may have any name.");
  command.callback([options] { write_output(plot(options->runs), options->output.path); });
}

}  // namespace dualpipe::planner::tool
