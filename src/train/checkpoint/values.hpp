#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "dualpipe/train/checkpoint.hpp"

namespace dualpipe::detail {

/// @throws InvalidArgument  a number that is not finite.
nlohmann::json json_of(const std::map<std::string, CheckpointValue>& values);
/// @throws InvalidArgument  a value of another type.
std::map<std::string, CheckpointValue> values_of(const nlohmann::json& json);

}  // namespace dualpipe::detail
