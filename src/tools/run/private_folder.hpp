#pragma once

#include <filesystem>

namespace dualpipe::run {

/// A new folder of mode 0700 in $XDG_RUNTIME_DIR, where that is such a folder of this user, else in $TMPDIR, else in
/// /tmp.
///
/// @throws std::runtime_error  it cannot be made, with the way out.
std::filesystem::path make_private_folder();

/// @return whether it is gone.
bool remove_folder(const std::filesystem::path& folder) noexcept;

/// Writes a new secret, 32 random bytes in hexadecimal, to a file of mode 0600 in `folder`.
///
/// @return the file.
/// @throws std::runtime_error  it cannot be made, with the way out.
std::filesystem::path make_secret(const std::filesystem::path& folder);

}  // namespace dualpipe::run
