#pragma once

#include <fcntl.h>

namespace dualpipe {

/// Opens /dev/null as each of stdin, stdout and stderr that is closed, or the next file that is opened would be taken for
/// it. To be called before any file is opened.
///
/// @param flags  O_RDWR; or O_RDONLY, with which writing fails as it does on a closed stream.
/// @return       false: there is no /dev/null.
inline bool open_standard_streams(int flags) {
  for (int stream = 0; stream <= 2; ++stream)
    if (::fcntl(stream, F_GETFD) < 0 && ::open("/dev/null", flags) != stream) return false;
  return true;
}

}  // namespace dualpipe
