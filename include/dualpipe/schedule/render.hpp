#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe {

/// The timeline as text in the manner of the DeepSeek-V3 report's figure: one row per rank, time to the right, every
/// step as wide as it is long, the shortest one just wide enough for its micro-batch. With a time axis above and a
/// legend below; lines end in a newline.
///
/// @param color  adds ANSI colours: one hue per pass, light where it is not the rank's first stage.
/// @throws InvalidArgument  as all functions here: an interval of a rank that the timeline lacks, or that ends before
/// it begins.
std::string to_ascii(const Timeline& timeline, bool color = false);

/// One picture; several timelines (predicted, measured) are drawn one below the other on one time axis, or, where their
/// units differ, each scaled to its own makespan. Hues and shades as in to_ascii; a pair has a black frame; transfers
/// are thin bars below the rank.
///
/// @throws InvalidArgument  also: no timeline at all.
std::string to_svg(const std::vector<Timeline>& timelines);

/// Trace Event Format (JSON) for Chrome's tracing page and Perfetto: a process per rank, a thread per lane. An abstract
/// unit is shown as 1 ms.
std::string to_trace(const Timeline& timeline);

/// Reads what to_trace wrote, exactly; events that others added are skipped.
///
/// @throws InvalidArgument  naming the byte (no JSON) or the event and what is wrong with it.
Timeline from_trace(std::string_view json);

}  // namespace dualpipe
