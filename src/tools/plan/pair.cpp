#include "tools/plan/pair.hpp"

#include <nlohmann/json.hpp>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/pair_timeline.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::planner::tool {
namespace {

std::string listed(const Chain& chain) {
  std::string text;
  for (const ChainNode& node : chain) text += (text.empty() ? "" : ", ") + node.name + (node.communicates ? "@" : "");
  return text.empty() ? "none" : text;
}

/// One after the other, each collective waited for.
double sequential(const Timeline& pair) {
  double sum = 0;
  for (const Interval& interval : pair.intervals)
    if (interval.lane != Lane::compute) sum += interval.end - interval.begin;
  return sum;
}

}  // namespace

std::string show_pair(const PairOptions& pair, const ViewOptions& view, const OutputOptions& output) {
  const Chain forward = parse_chain(pair.forward), backward = parse_chain(pair.backward);
  const std::vector<PairOp> order = pair_order(structure(forward), structure(backward), pair.weights);
  const std::vector<PairOp> launched = launch_order(structure(forward), structure(backward), order);
  Timeline timeline = pair_timeline(forward, backward, launched);
  timeline.name = listed(forward) + " with " + (backward == forward ? "the same" : listed(backward));
  const double apart = sequential(timeline);
  const RankReport report = planner::report(timeline).ranks.front();
  const double makespan = extent(timeline).length();

  if (output.format == "svg") return to_svg({timeline}, picture_options(view, output, timeline));
  const auto named = [&](const std::vector<PairOp>& ops) { return to_string(ops, names(forward), names(backward)); };
  if (output.format == "json") {
    const auto list = [&](const std::vector<PairOp>& ops) {
      nlohmann::ordered_json array = nlohmann::ordered_json::array();
      for (const PairOp& op : ops) array.push_back(named({op}));
      return array;
    };
    return dumped({{"forward", structure(forward)},
                   {"backward", structure(backward)},
                   {"order", list(order)},
                   {"launched", list(launched)},
                   {"makespan", makespan},
                   {"sequential", apart},
                   {"compute", report.compute},
                   {"exposed", report.collectives.exposed},
                   {"hidden", report.collectives.hidden}});
  }
  PictureOptions options = picture_options(view, output, timeline);
  options.lanes = true;
  return "forward:     " + listed(forward) + "\nbackward:    " + listed(backward) +
         (backward.size() > 1 ? ", last to first" : "") + "\norder:       " + named(order) +
         "\nas launched: " + named(launched) + "\n\n" + to_ascii(timeline, options) + "\n" +
         detail::str("takes ", makespan, "; one after the other with communication exposed ", apart, ": ratio ",
                     makespan / apart, ". Communication ", report.collectives.total(), ", exposed ",
                     report.collectives.exposed, ".\n");
}

}  // namespace dualpipe::planner::tool
