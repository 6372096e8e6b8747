// Traces from JSON: what is read is written back the same and can be drawn and reported on.
#include "dualpipe/planner/trace.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/cost_file.hpp"
#include "dualpipe/planner/cost_model.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "fuzz/target.hpp"

namespace dualpipe::fuzz {
namespace {

// Drawing refuses what has no picture, with a message.
template <class Draw>
void draw(const Draw& picture_of) {
  try {
    picture_of();
  } catch (const InvalidArgument& error) {
    require_readable(error.what());
  }
}

}  // namespace

void read(std::string_view text) {
  Timeline timeline;
  try {
    timeline = planner::from_trace(text);
  } catch (const InvalidArgument& error) {
    return require_readable(error.what());
  }
  const Timeline again = planner::from_trace(planner::to_trace(timeline));
  require(again.name == timeline.name && again.num_ranks == timeline.num_ranks &&
              again.seconds_per_unit == timeline.seconds_per_unit && again.intervals == timeline.intervals &&
              again.stages == timeline.stages,
          "what was read is written so that it is read the same");
  draw([&] { planner::report(timeline); });
  draw([&] { planner::to_json({planner::measure_costs(timeline).costs, {}}); });
  draw([&] { planner::to_ascii(timeline); });
  draw([&] { planner::to_svg({timeline, timeline}); });
}

}  // namespace dualpipe::fuzz
