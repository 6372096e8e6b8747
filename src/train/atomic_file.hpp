#pragma once

#include <string>
#include <string_view>

namespace dualpipe::detail {

/// A file that appears whole or not at all: bytes go into a new file of a random name in the same folder, and commit()
/// brings them to the disk and to `path`. Without commit() nothing remains.
class AtomicFile {
 public:
  /// @throws InvalidArgument  here and in the others, with the path and the reason.
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::string_view bytes);
  /// What was at `path` is replaced.
  void commit();

 private:
  [[noreturn]] void fail(int error) const;

  std::string path_, temporary_;
  int file_ = -1;
};

/// Brings the names in a folder to the disk. @throws InvalidArgument  with the path and the reason.
void sync_folder(const std::string& path);

}  // namespace dualpipe::detail
