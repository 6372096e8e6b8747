#pragma once

#include <optional>
#include <string>

#include "launch/failure_report.hpp"

namespace dualpipe {
struct World;
}

namespace dualpipe::detail {

/// The file in which the launcher of this node writes which of its ranks has failed first (DUALPIPE_FAILED_FILE); empty:
/// it writes none, or `world` is not the one that it has launched.
std::string failed_file(const World& world);

/// What is in that file; nullopt: nothing so far, or something else.
std::optional<FailureReport> failure_in(const std::string& failed_file) noexcept;

}  // namespace dualpipe::detail
