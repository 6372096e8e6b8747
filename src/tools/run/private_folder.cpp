#include "tools/run/private_folder.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <system_error>

#include "contact/secrets.hpp"
#include "tools/run/spawn.hpp"

namespace dualpipe::run {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void throw_unusable(const std::string& what, const fs::path& where, int error) {
  throw std::runtime_error("cannot make " + what + " in " + where.string() + ": " +
                           std::generic_category().message(error) +
                           "; set TMPDIR to a folder in which this user can make files");
}

std::string variable_or(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : otherwise;
}

/// Empty: errno says why.
fs::path private_folder_in(const std::string& parent) {
  std::string name = (fs::absolute(parent) / "dualpipe-run-XXXXXX").string();
  return ::mkdtemp(name.data()) != nullptr ? fs::path(name) : fs::path();
}

}  // namespace

fs::path make_private_folder() {
  const std::string runtime = variable_or("XDG_RUNTIME_DIR", "");
  struct stat status{};
  if (!runtime.empty() && ::stat(runtime.c_str(), &status) == 0 && S_ISDIR(status.st_mode) &&
      status.st_uid == ::geteuid() && (status.st_mode & 0777) == 0700) {
    if (fs::path folder = private_folder_in(runtime); !folder.empty()) return folder;
  }
  const std::string temporary = variable_or("TMPDIR", "/tmp");
  fs::path folder = private_folder_in(temporary);
  if (folder.empty()) throw_unusable("a private folder", temporary, errno);
  return folder;
}

bool remove_folder(const fs::path& folder) noexcept {
  std::error_code error;
  fs::remove_all(folder, error);
  return !error;
}

fs::path make_secret(const fs::path& folder) {
  const std::string text = detail::hexadecimal(detail::random_bytes());
  fs::path path = folder / "secret";
  const Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (file.get() < 0) throw_unusable("a secret", folder, errno);
  const ssize_t written = ::write(file.get(), text.data(), text.size());
  if (written != static_cast<ssize_t>(text.size())) throw_unusable("a secret", folder, written < 0 ? errno : ENOSPC);
  return path;
}

}  // namespace dualpipe::run
