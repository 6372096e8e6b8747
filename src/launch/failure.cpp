#include "dualpipe/launch/failure.hpp"

#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "dualpipe/detail/files.hpp"
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
      detail::write_file(world.error_file, error_file_text(message));
    } catch (const std::exception& failure) {
      std::cerr << detail::str("rank ", world.rank, ": the launcher's error file was not written: ", failure.what(),
                               "\n");
    }
  } catch (...) {
    // Out of memory while reporting: the exit code remains.
  }
}

}  // namespace dualpipe
