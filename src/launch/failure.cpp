#include "dualpipe/launch/failure.hpp"

#include <charconv>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <string>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "launch/environment.hpp"
#include "launch/failed_file.hpp"
#include "launch/failure_report.hpp"

namespace dualpipe {
namespace {

detail::FailureReport report_of(const World& world, const std::exception& error) {
  using std::chrono::duration_cast, std::chrono::nanoseconds, std::chrono::system_clock;
  detail::FailureReport report{.message = error.what(),
                               .rank = world.rank,
                               .origin = world.rank,
                               .operation = {},
                               .time_ns = duration_cast<nanoseconds>(system_clock::now().time_since_epoch()).count()};
  // Errors of a communicator already begin with the rank.
  if (const std::string name = detail::str("rank ", world.rank, ": "); !report.message.starts_with(name))
    report.message = name + report.message;
  if (const auto* failure = dynamic_cast<const CommError*>(&error)) {
    report.origin = failure->origin_rank();
    report.operation = failure->operation();
  }
  return report;
}

/// A program that fails before it has read its world is of one rank as far as it knows, but not for its launcher.
World as_launched(World world) {
  if (world.size != 1 || world.rank != 0 || !world.error_file.empty()) return world;
  world.error_file = detail::error_file(detail::variable);
  const std::string rank = detail::variable("RANK").value_or("");
  if (!world.error_file.empty()) std::from_chars(rank.data(), rank.data() + rank.size(), world.rank);
  return world;
}

}  // namespace

std::string detail::failed_file(const World& world) {
  return is_launched_as(world) ? variable("DUALPIPE_FAILED_FILE").value_or("") : "";
}

std::optional<detail::FailureReport> detail::failure_in(const std::string& failed_file) noexcept {
  try {
    if (failed_file.empty() || !std::filesystem::exists(failed_file)) return std::nullopt;
    return failure_report_from(read_file(failed_file));
  } catch (const std::exception&) {
    return std::nullopt;  // a rank that has met another learns what happens to it without the file
  }
}

void report_failure(const World& known, const std::exception& error) noexcept {
  try {
    const World world = as_launched(known);
    const detail::FailureReport report = report_of(world, error);
    std::cout.flush();
    std::cerr << report.message + "\n" << std::flush;
    if (world.error_file.empty()) return;
    try {
      detail::write_file(world.error_file, detail::to_json(report));
    } catch (const std::exception& failure) {
      std::cerr << detail::str("rank ", world.rank, ": the launcher's error file was not written: ", failure.what(),
                               "\n");
    }
  } catch (...) {
    // Out of memory while reporting: the exit code remains.
  }
}

}  // namespace dualpipe
