#include "tools/plan/view.hpp"

#include <unistd.h>

#include <cstdlib>

namespace dualpipe::planner::tool {

void add_color(CLI::App& command, ViewOptions& view) {
  command
      .add_option("--color", view.color, "colours in text; auto: on a terminal, unless NO_COLOR is set (default: auto)")
      ->check(CLI::IsMember({"auto", "always", "never"}).description(""))
      ->option_text("auto|always|never");
}

void add_view(CLI::App& command, ViewOptions& view) {
  add_color(command, view);
  command.add_option("--window", view.window, "show this part only, in the unit of the time axis")
      ->delimiter(',')
      ->expected(2)
      ->option_text("BEGIN,END");
  command.add_option("--rows", view.rows, "show these ranks only, in this order")
      ->delimiter(',')
      ->option_text("R,R,...");
  command.add_flag("--lanes", view.lanes, "ascii: for each rank its nodes that compute and its collectives, by name");
}

bool colored(const ViewOptions& view, const OutputOptions& output) {
  if (view.color != "auto") return view.color == "always";
  const char* no_color = std::getenv("NO_COLOR");  // no-color.org: any value but the empty one
  return output.path.empty() && ::isatty(STDOUT_FILENO) == 1 && (no_color == nullptr || *no_color == '\0');
}

PictureOptions picture_options(const ViewOptions& view, const OutputOptions& output, const Timeline& timeline) {
  PictureOptions options{.color = colored(view, output), .lanes = view.lanes, .ranks = view.rows};
  if (!view.window.empty()) {
    const double begin = extent(timeline).begin;
    const double unit = timeline.seconds_per_unit == 0 ? 1 : timeline.seconds_per_unit;
    options.window = {begin + view.window[0] / unit, begin + view.window[1] / unit};
  }
  return options;
}

}  // namespace dualpipe::planner::tool
