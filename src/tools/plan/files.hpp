#pragma once

#include <string>

namespace dualpipe::plan {

/// The whole file. @throws InvalidArgument  with the path and the reason.
std::string read_file(const std::string& path);

/// Writes `text` to `path`, or to standard output where the path is empty. A regular file appears whole or not at all:
/// it is written beside its place and renamed.
///
/// @throws InvalidArgument  with the path and the reason.
void write_output(const std::string& text, const std::string& path);

}  // namespace dualpipe::plan
