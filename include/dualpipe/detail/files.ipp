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

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  // A name that nobody can have put there before; O_EXCL refuses one that somebody has.
  std::random_device random;
  constexpr int attempts = 8;
  for (int attempt = 1; file_ < 0; ++attempt) {
    temporary_ = str(path_, ".", std::hex, random(), random(), ".tmp");
    file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (file_ < 0 && (errno != EEXIST || attempt == attempts)) throw_file_error("write", path_, errno);
  }
}

AtomicFile::~AtomicFile() {
  if (file_ >= 0) ::close(file_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::string_view bytes) {
  if (!write_all(file_, bytes)) throw_file_error("write", path_, errno);
}

void AtomicFile::commit() {
  if (::fsync(file_) != 0 || ::close(std::exchange(file_, -1)) != 0 ||
      std::rename(temporary_.c_str(), path_.c_str()) != 0)
    throw_file_error("write", path_, errno);
  temporary_.clear();
}

void write_file(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void sync_folder(const std::string& path) {
  const FileDescriptor folder(path, O_RDONLY | O_DIRECTORY);
  DUALPIPE_CHECK(folder && ::fsync(folder.get()) == 0, "cannot write ", path,
                 " to the disk: ", std::generic_category().message(errno));
}

void write_device(const std::string& path, std::string_view text) {
  FileDescriptor file(path, O_WRONLY);
  if (!file || !write_all(file.get(), text) || !file.close()) throw_file_error("write", path, errno);
}

}  // namespace dualpipe::detail
