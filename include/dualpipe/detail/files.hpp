#pragma once

#include <string>
#include <string_view>

#include "dualpipe/detail/config.hpp"

namespace dualpipe::detail {

/// The whole file, of at most 1 GiB. @throws InvalidArgument  with the path and the reason.
DUALPIPE_DECL std::string read_file(const std::string& path);

/// Writes a file that appears whole or not at all: into a new file of a random name in the same folder, to the disk,
/// then renamed to `path`. A symbolic link at `path` is replaced, not followed.
///
/// @throws InvalidArgument  with the path and the reason.
DUALPIPE_DECL void write_file(const std::string& path, std::string_view text);

/// Writes into what is there already and is no regular file, as a device or a pipe.
///
/// @throws InvalidArgument  with the path and the reason.
DUALPIPE_DECL void write_device(const std::string& path, std::string_view text);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/files.ipp"
#endif
