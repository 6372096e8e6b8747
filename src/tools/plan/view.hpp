#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "dualpipe/planner/render.hpp"
#include "tools/plan/options.hpp"

// How pictures are shown, on the command line.
namespace dualpipe::planner::tool {

struct ViewOptions {
  std::string color = "auto";
  std::vector<double> window;  ///< begin and end, from the begin of the picture; empty: all
  std::vector<int> rows;       ///< ranks; empty: all
  bool lanes = false;
};

/// --color. Binds to `view`, which must live as long as the command does.
void add_color(CLI::App& command, ViewOptions& view);
/// --color, --window, --rows and --lanes.
void add_view(CLI::App& command, ViewOptions& view);

/// Colours where asked for; by default on a terminal, unless NO_COLOR is set.
bool colored(const ViewOptions& view, const OutputOptions& output);

/// @param timeline  whose time the window counts.
PictureOptions picture_options(const ViewOptions& view, const OutputOptions& output, const Timeline& timeline);

}  // namespace dualpipe::planner::tool
