#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace dualpipe::detail {

/// Our files nest a few levels only. A file of opening brackets would take many times its size of memory.
inline constexpr int max_json_depth = 32;

/// Time and memory are linear in the text, whatever it holds.
///
/// @throws InvalidArgument  of bounded length: not JSON, with line and column; too deep; a key that an object has twice.
nlohmann::json parse_json(std::string_view text);

/// For messages: as JSON, which has no control characters, and cut.
std::string brief(const nlohmann::json& value);

}  // namespace dualpipe::detail
