#pragma once

#include <string>

namespace dualpipe::detail {

/// The secret in the file `path`, which `variable` names. It goes into no message.
///
/// @throws InvalidArgument  not a regular file of this user or root that nobody else may read or write, or fewer than 16
/// or more than 4096 bytes without the newline at its end.
std::string read_secret(const std::string& variable, const std::string& path);

}  // namespace dualpipe::detail
