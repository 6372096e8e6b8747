#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace dualpipe::detail {

/// Our files nest a few levels only. A file of opening brackets would take many times its size of memory.
inline constexpr int max_json_depth = 32;

enum class Keys { any, unique };  ///< unique: an object that names a key twice is refused; else the last counts

/// Time and memory are linear in the text, whatever it holds.
///
/// @throws InvalidArgument  naming line and column where it is not JSON, in a message of bounded length.
nlohmann::json parse_json(std::string_view text, Keys keys = Keys::any);

/// A value for messages: as JSON, which has no control characters, and cut.
std::string brief(const nlohmann::json& value);

}  // namespace dualpipe::detail
