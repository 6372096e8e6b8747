#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe {

/// The schedule as text in the manner of the DeepSeek-V3 report's figure: one row per rank, time to the right, F and B as wide as they
/// are long.
std::string to_ascii(const Timeline& timeline, bool color = false);

/// One picture; several timelines (predicted, measured) are drawn one below the other on one time axis, each scaled to its own makespan where units differ.
std::string to_svg(const std::vector<Timeline>& timelines);

/// Trace Event Format (JSON) for Chrome's tracing page and Perfetto; from_trace reads it back.
std::string to_trace(const Timeline& timeline);
Timeline from_trace(std::string_view json);

}  // namespace dualpipe
