#include "train/atomic_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <random>
#include <system_error>
#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  std::random_device random;
  constexpr int attempts = 8;
  for (int attempt = 1; file_ < 0; ++attempt) {
    temporary_ = str(path_, ".", std::hex, random(), random(), ".tmp");
    file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (file_ < 0 && (errno != EEXIST || attempt == attempts)) {
      const int error = errno;
      temporary_.clear();
      fail(error);
    }
  }
}

AtomicFile::~AtomicFile() {
  if (file_ >= 0) ::close(file_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(file_, bytes.data(), bytes.size());
    if (count < 0 && errno != EINTR) fail(errno);
    if (count > 0) bytes.remove_prefix(static_cast<std::size_t>(count));
  }
}

void AtomicFile::commit() {
  if (::fsync(file_) != 0 || ::close(std::exchange(file_, -1)) != 0 ||
      std::rename(temporary_.c_str(), path_.c_str()) != 0)
    fail(errno);
  temporary_.clear();
}

void AtomicFile::fail(int error) const {
  throw InvalidArgument(str("cannot write ", path_, ": ", std::generic_category().message(error)));
}

void sync_folder(const std::string& path) {
  const int folder = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool synced = folder >= 0 && ::fsync(folder) == 0;
  const int error = errno;
  if (folder >= 0) ::close(folder);
  DUALPIPE_CHECK(synced, "cannot write ", path, " to the disk: ", std::generic_category().message(error));
}

}  // namespace dualpipe::detail
