#pragma once

#include "tools/run/options.hpp"

namespace dualpipe::run {

/// Starts the ranks, forwards their output and the launcher's signals, and ends all when one fails.
/// @return the launcher's exit code.
/// @throws std::system_error  a system call failed; std::errc::no_such_file_or_directory and the like where the program
/// cannot be executed.
int launch(const Options& options);

}  // namespace dualpipe::run
