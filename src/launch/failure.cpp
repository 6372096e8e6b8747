#include "dualpipe/launch/failure.hpp"

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace {

/// The layout that torchrun reads; it shows the message of the rank with the smallest timestamp.
std::string error_file_text(const std::string& message) {
  const auto now =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch());
  const nlohmann::json report = {
      {"message", {{"message", message}, {"extraInfo", {{"timestamp", std::to_string(now.count())}}}}}};
  return report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

/// Renamed into place, so that a reader sees a whole file or none.
void write_whole(const std::filesystem::path& path, const std::string& text) {
  std::filesystem::path draft = path;
  draft += ".tmp";
  {
    std::ofstream out(draft, std::ios::binary | std::ios::trunc);
    out << text;
    out.flush();
    if (!out) throw Error("cannot write '" + draft.string() + "'");
  }
  std::filesystem::rename(draft, path);
}

}  // namespace

void report_failure(const World& world, const std::exception& error) noexcept {
  try {
    std::string message = error.what();
    // Errors of the communicator begin so by themselves.
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
    // Out of memory while reporting: the exit code still tells.
  }
}

}  // namespace dualpipe
