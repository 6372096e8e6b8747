#include "dualpipe/launch/failure.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <system_error>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace {

/// In the format of torchrun, which shows the message of the rank with the smallest timestamp.
std::string error_file_text(const std::string& message) {
  const auto now =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch());
  const nlohmann::json report = {
      {"message", {{"message", message}, {"extraInfo", {{"timestamp", std::to_string(now.count())}}}}}};
  return report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

[[noreturn]] void throw_errno(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

/// Readers see the whole file or none. The draft has a new, unpredictable name, so that no link placed there beforehand
/// is followed.
void write_whole(const std::filesystem::path& path, std::string_view text) {
  std::string draft = path.string() + ".XXXXXX";
  const int file = ::mkostemp(draft.data(), O_CLOEXEC);
  if (file < 0) throw_errno("cannot create '" + draft + "'");
  try {
    while (!text.empty()) {
      const ssize_t written = ::write(file, text.data(), text.size());
      if (written < 0 && errno != EINTR) throw_errno("cannot write '" + draft + "'");
      if (written > 0) text.remove_prefix(static_cast<std::size_t>(written));
    }
    if (::rename(draft.c_str(), path.c_str()) != 0) throw_errno("cannot rename '" + draft + "'");
  } catch (...) {
    ::unlink(draft.c_str());
    ::close(file);
    throw;
  }
  ::close(file);
}

}  // namespace

void report_failure(const World& world, const std::exception& error) noexcept {
  try {
    std::string message = error.what();
    // Errors of a communicator already begin with the rank.
    if (const std::string name = detail::str("rank ", world.rank, ": "); !message.starts_with(name))
      message = name + message;
    std::cout.flush();
    std::cerr << message + "\n" << std::flush;
    if (world.error_file.empty()) return;
    try {
      write_whole(world.error_file, error_file_text(message));
    } catch (const std::exception& failure) {
      std::cerr << detail::str("rank ", world.rank, ": the launcher's error file was not written: ", failure.what(),
                               "\n");
    }
  } catch (...) {
    // Out of memory while reporting: the exit code remains.
  }
}

}  // namespace dualpipe
