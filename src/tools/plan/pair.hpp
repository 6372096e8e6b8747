#pragma once

#include <string>

#include "tools/plan/options.hpp"
#include "tools/plan/view.hpp"

// `show --pair`: in which order the nodes of a forward and of a backward run.
namespace dualpipe::planner::tool {

struct PairOptions {
  std::string forward;   ///< as parse_chain takes it
  std::string backward;  ///< likewise
  bool weights = true;   ///< false: the backward is an I
};

/// The order, the order in which a host launches it, and a picture with two lanes; or its SVG, trace or JSON.
std::string show_pair(const PairOptions& pair, const ViewOptions& view, const OutputOptions& output);

}  // namespace dualpipe::planner::tool
