#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace dualpipe::detail {

/// What a failing rank tells its launcher.
struct FailureReport {
  std::string message;
  int rank = 0;              ///< that failed
  int origin = -1;           ///< rank where it began; -1: unknown
  std::string operation;     ///< that was under way; may be empty
  std::int64_t time_ns = 0;  ///< since 1970
};

/// JSON that torchrun reads as one of its own error files, and takes for later where the failure began elsewhere.
std::string to_json(const FailureReport& report);

/// What those say who have waited for that rank to meet them.
std::string absence_of(const FailureReport& report);

/// @return nullopt for any other text.
std::optional<FailureReport> failure_report_from(const std::string& json);

}  // namespace dualpipe::detail
