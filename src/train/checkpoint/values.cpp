#include "train/checkpoint/values.hpp"

#include <cmath>
#include <limits>

#include "dualpipe/error.hpp"
#include "planner/json.hpp"

namespace dualpipe::detail {

nlohmann::json json_of(const std::map<std::string, CheckpointValue>& values) {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [name, value] : values) {
    if (const auto* number = std::get_if<double>(&value))
      DUALPIPE_CHECK(std::isfinite(*number), "a checkpoint keeps finite numbers, got ", *number, " for ", name);
    std::visit([&json, &key = name](const auto& each) { json[key] = each; }, value);
  }
  return json;
}

std::map<std::string, CheckpointValue> values_of(const nlohmann::json& json) {
  std::map<std::string, CheckpointValue> values;
  for (const auto& [name, value] : json.items()) {
    if (value.is_number_float())
      values[name] = value.get<double>();
    else if (value.is_number_integer() &&
             (!value.is_number_unsigned() ||
              value.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())))
      values[name] = value.get<std::int64_t>();
    else if (value.is_string())
      values[name] = value.get<std::string>();
    else
      throw InvalidArgument(str("the value ", brief(name), " is neither number nor string: ", brief(value)));
  }
  return values;
}

}  // namespace dualpipe::detail
