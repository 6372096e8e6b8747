#include "tools/plan/files.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::planner::tool {
namespace {

/// Whether another user has put it there.
bool is_of_a_stranger(const std::string& path) {
  struct stat status{};
  return ::lstat(path.c_str(), &status) == 0 && status.st_uid != ::geteuid() && status.st_uid != 0;
}

}  // namespace

void write_output(const std::string& text, const std::string& path) {
  if (path.empty()) {
    const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
    DUALPIPE_CHECK(written, "cannot write to standard output: ", std::strerror(errno));
    return;
  }
  namespace fs = std::filesystem;
  std::error_code error;
  if (is_of_a_stranger(path)) return detail::write_file(path, text);  // a link or a pipe would lead elsewhere
  if (fs::exists(path, error) && !fs::is_regular_file(path, error)) return detail::write_device(path, text);
  // A symbolic link stays, its target is replaced.
  fs::path target = path;
  if (fs::is_symlink(path, error)) {
    target = fs::weakly_canonical(path, error);
    DUALPIPE_CHECK(!error, "cannot write ", path, ": ", error.message());
  }
  detail::write_file(target, text);
}

}  // namespace dualpipe::planner::tool
