#pragma once

#include <cstdlib>
#include <optional>
#include <string>

#include "dualpipe/launch/world.hpp"

namespace dualpipe::detail {

/// A variable of this process; nullopt where it is unset.
inline std::optional<std::string> variable(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value ? std::optional<std::string>(value) : std::nullopt;
}

/// The file by which a rank tells its launcher why it ends; empty: the launcher wants none.
inline std::string error_file(const World::Lookup& lookup) {
  return lookup(lookup("TORCHELASTIC_RUN_ID") ? "TORCHELASTIC_ERROR_FILE" : "DUALPIPE_ERROR_FILE").value_or("");
}

}  // namespace dualpipe::detail
