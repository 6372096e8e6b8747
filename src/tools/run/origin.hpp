#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace dualpipe::run {

/// What a rank that failed tells of the rank where it began.
struct Testimony {
  int origin = 0;            ///< whom it names, perhaps itself
  std::int64_t time_ns = 0;  ///< of the failure, by one clock for all
  bool killed = false;       ///< by a signal, without a report: of failures seen together, the cause
};

/// The rank that most name, of those named equally often the one that is named first.
///
/// @return nullopt without a testimony.
std::optional<int> find_origin(const std::vector<Testimony>& testimonies);

}  // namespace dualpipe::run
