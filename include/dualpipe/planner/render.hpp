#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dualpipe/planner/report.hpp"

namespace dualpipe::planner {

/// A remark on a stretch of a rank's time, short enough to be written into it.
struct Mark {
  int rank = 0;
  Window window;
  std::string text;
};

struct PictureOptions {
  bool color = false;  ///< text only: adds ANSI colours
  bool lanes = false;  ///< text only: two lines per rank, its nodes that compute and its collectives, by name
  std::optional<Window> window = {};    ///< the part to show, on the timeline's own clock; absent: all of its computing
  std::vector<int> ranks = {};          ///< rows to show, in this order; empty: all
  std::vector<Mark> marks = {};         ///< beside the rows
  std::vector<std::string> notes = {};  ///< lines below the legend
};

/// The timeline as text in the manner of the DeepSeek-V3 report's figure: one row per rank, time to the right, every
/// step as wide as it is long, the shortest one just wide enough for its micro-batch (with `lanes` every bar for its
/// name, as far as 200 columns go). With a time axis above and a legend below; lines end in a newline. Colours are one
/// hue per pass, light where it is not the rank's first stage.
///
/// @throws InvalidArgument  as all functions here: an interval of a rank that the timeline lacks, or that ends before
/// it begins; a row or a window that is not there.
std::string to_ascii(const Timeline& timeline, const PictureOptions& options = {});

/// One picture; several timelines (predicted, measured) are drawn one below the other on one time axis, or, where their
/// units differ, each scaled to its own makespan. Hues and shades as in to_ascii; a pair has a black frame; transfers
/// are thin bars below the rank. Stages that communicate show their nodes within the frame of the step and their
/// collectives below, the forward's and the backward's, with what is exposed in red. Marks are those of the first
/// timeline.
///
/// @throws InvalidArgument  also: no timeline at all.
std::string to_svg(const std::vector<Timeline>& timelines, const PictureOptions& options = {});

}  // namespace dualpipe::planner
