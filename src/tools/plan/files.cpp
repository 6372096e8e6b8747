#include "tools/plan/files.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>

#include "dualpipe/error.hpp"

namespace dualpipe::plan {
namespace {

namespace fs = std::filesystem;

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

/// Far above any schedule or trace; keeps a device or a wrong file from filling the memory.
constexpr std::size_t max_bytes = std::size_t{1} << 30;

File open(const std::string& path, const char* mode, const char* purpose) {
  File file(std::fopen(path.c_str(), mode));
  DUALPIPE_CHECK(file != nullptr, "cannot ", purpose, " ", path, ": ", std::strerror(errno));
  return file;
}

void write_to(std::FILE* file, const std::string& text, const std::string& name) {
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size() && std::fflush(file) == 0;
  DUALPIPE_CHECK(written, "cannot write ", name, ": ", std::strerror(errno));
}

}  // namespace

std::string read_file(const std::string& path) {
  std::error_code ignored;
  DUALPIPE_CHECK(!fs::is_directory(path, ignored), "cannot read ", path, ": it is a directory");
  const File file = open(path, "rb", "read");
  std::string text;
  for (std::size_t used = 0;;) {
    text.resize(used + (std::size_t{1} << 20));
    const std::size_t got = std::fread(text.data() + used, 1, text.size() - used, file.get());
    used += got;
    if (got > 0) {
      DUALPIPE_CHECK(used <= max_bytes, "cannot read ", path, ": more than ", max_bytes >> 20, " MiB");
      continue;
    }
    DUALPIPE_CHECK(std::ferror(file.get()) == 0, "cannot read ", path, ": ", std::strerror(errno));
    text.resize(used);
    return text;
  }
}

void write_output(const std::string& text, const std::string& path) {
  if (path.empty()) return write_to(stdout, text, "to standard output");
  std::error_code error;
  if (fs::exists(path, error) && !fs::is_regular_file(path, error)) {
    // A device or a pipe: there is nothing to rename over.
    const File file = open(path, "wb", "write");
    return write_to(file.get(), text, path);
  }
  // Through symbolic links, so that these stay.
  const fs::path target = fs::weakly_canonical(path, error);
  DUALPIPE_CHECK(!error, "cannot write ", path, ": ", error.message());
  const std::string beside = detail::str(target.string(), ".tmp", ::getpid());
  try {
    File file = open(beside, "wb", "write");
    write_to(file.get(), text, beside);
    // What is buffered may fail only here.
    DUALPIPE_CHECK(std::fclose(file.release()) == 0, "cannot write ", beside, ": ", std::strerror(errno));
    fs::rename(beside, target, error);
    DUALPIPE_CHECK(!error, "cannot write ", path, ": ", error.message());
  } catch (...) {
    fs::remove(beside, error);
    throw;
  }
}

}  // namespace dualpipe::plan
