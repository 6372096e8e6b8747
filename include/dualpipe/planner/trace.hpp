#pragma once

#include <string>
#include <string_view>

#include "dualpipe/schedule/timeline.hpp"

namespace dualpipe::planner {

/// Trace Event Format (JSON) for Chrome's tracing page and Perfetto: a process per rank, a thread per lane. An abstract
/// unit is shown as 1 ms.
std::string to_trace(const Timeline& timeline);

/// Reads what to_trace wrote, exactly; events that others added are skipped.
///
/// @throws InvalidArgument  naming the byte (no JSON) or the event and what is wrong with it.
Timeline from_trace(std::string_view json);

}  // namespace dualpipe::planner
