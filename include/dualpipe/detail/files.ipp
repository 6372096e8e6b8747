#pragma once

#include "dualpipe/detail/files.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <random>
#include <system_error>
#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

/// An open file, closed with its owner.
class FileDescriptor {
 public:
  FileDescriptor(const std::string& path, int flags)
      : number_(::open(path.c_str(), flags | O_CLOEXEC | O_NOCTTY, 0666)) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (number_ >= 0) ::close(number_);
  }
  int get() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }
  /// What was written may fail only here.
  bool close() { return ::close(std::exchange(number_, -1)) == 0; }

 private:
  int number_;
};

[[noreturn]] inline void throw_file_error(const char* purpose, const std::string& path, int error) {
  throw InvalidArgument(str("cannot ", purpose, " ", path, ": ", std::generic_category().message(error)));
}

/// @return  false: errno says why.
inline bool write_all(int file, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = ::write(file, text.data(), text.size());
    if (count < 0 && errno != EINTR) return false;
    if (count > 0) text.remove_prefix(count);
  }
  return true;
}

std::string read_file(const std::string& path) {
  constexpr std::size_t max_bytes = std::size_t{1} << 30;  // a device would fill the memory
  constexpr std::size_t chunk = std::size_t{1} << 20;
  std::error_code ignored;
  DUALPIPE_CHECK(!std::filesystem::is_directory(path, ignored), "cannot read ", path, ": it is a directory");
  const FileDescriptor file(path, O_RDONLY);
  if (!file) throw_file_error("read", path, errno);
  std::string text;
  for (std::size_t used = 0;;) {
    text.resize(used + chunk);
    const ssize_t count = ::read(file.get(), text.data() + used, chunk);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_file_error("read", path, errno);
    used += count;
    DUALPIPE_CHECK(used <= max_bytes, "cannot read ", path, ": more than ", max_bytes >> 20, " MiB");
    text.resize(used);
    if (count == 0) return text;
  }
}

void write_file(const std::string& path, std::string_view text) {
  // A name that nobody can have put there before; O_EXCL refuses one that somebody has.
  std::random_device random;
  constexpr int attempts = 8;
  for (int attempt = 1;; ++attempt) {
    const std::string beside = str(path, ".", std::hex, random(), random(), ".tmp");
    FileDescriptor file(beside, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW);
    if (!file && errno == EEXIST && attempt < attempts) continue;
    if (!file) throw_file_error("write", path, errno);
    if (write_all(file.get(), text) && ::fsync(file.get()) == 0 && file.close() &&
        std::rename(beside.c_str(), path.c_str()) == 0)
      return;
    const int error = errno;
    ::unlink(beside.c_str());
    throw_file_error("write", path, error);
  }
}

void write_device(const std::string& path, std::string_view text) {
  FileDescriptor file(path, O_WRONLY);
  if (!file || !write_all(file.get(), text) || !file.close()) throw_file_error("write", path, errno);
}

}  // namespace dualpipe::detail
