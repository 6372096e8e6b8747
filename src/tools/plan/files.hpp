#pragma once

#include <string>

namespace dualpipe::planner::tool {

/// Writes `text` to `path`, or to standard output where the path is empty. A regular file appears whole or not at all,
/// and a symbolic link stays.
///
/// @throws InvalidArgument  with the path and the reason.
void write_output(const std::string& text, const std::string& path);

}  // namespace dualpipe::planner::tool
