#pragma once

#include <string>
#include <string_view>

#include "dualpipe/detail/config.hpp"

namespace dualpipe::detail {

/// The whole file, of at most 1 GiB. @throws InvalidArgument  with the path and the reason.
DUALPIPE_DECL std::string read_file(const std::string& path);

/// A file that appears whole or not at all: bytes go into a new file of a random name in the same folder, and commit()
/// brings them to the disk and to `path`. Without commit() nothing remains. A symbolic link at `path` is replaced, not
/// followed.
class AtomicFile {
 public:
  /// @throws InvalidArgument  here and in the others, with the path and the reason.
  DUALPIPE_DECL explicit AtomicFile(std::string path);
  DUALPIPE_DECL ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  DUALPIPE_DECL void write(std::string_view bytes);
  /// What was at `path` is replaced.
  DUALPIPE_DECL void commit();

 private:
  std::string path_, temporary_;
  int file_ = -1;
};

/// An AtomicFile of `text`. @throws InvalidArgument  with the path and the reason.
DUALPIPE_DECL void write_file(const std::string& path, std::string_view text);

/// Brings the names in a folder to the disk. @throws InvalidArgument  with the path and the reason.
DUALPIPE_DECL void sync_folder(const std::string& path);

/// Writes into what is there already and is no regular file, as a device or a pipe.
///
/// @throws InvalidArgument  with the path and the reason.
DUALPIPE_DECL void write_device(const std::string& path, std::string_view text);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/files.ipp"
#endif
