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

/// Whether that is the rank that the launcher has given this process. A program may make other worlds, of a part of the
/// ranks.
inline bool is_launched_as(const World& world) {
  const auto is = [](const std::string& name, int number) {
    const std::optional<std::string> value = variable(name);
    return !value || *value == std::to_string(number);
  };
  return is("RANK", world.rank) && is("WORLD_SIZE", world.size);
}

/// The file by which a rank tells its launcher why it ends; empty: the launcher wants none.
inline std::string error_file(const World::Lookup& lookup) {
  return lookup(lookup("TORCHELASTIC_RUN_ID") ? "TORCHELASTIC_ERROR_FILE" : "DUALPIPE_ERROR_FILE").value_or("");
}

}  // namespace dualpipe::detail
