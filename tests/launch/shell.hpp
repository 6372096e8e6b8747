#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

namespace dualpipe::testing {

inline std::vector<std::string> launcher(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), DUALPIPE_RUN);
  return arguments;
}

/// `script` by /bin/sh on `ranks` ranks.
inline std::vector<std::string> shell(int ranks, const std::string& script,
                                      const std::vector<std::string>& flags = {}) {
  std::vector<std::string> arguments = {"-n", std::to_string(ranks)};
  arguments.insert(arguments.end(), flags.begin(), flags.end());
  arguments.insert(arguments.end(), {"--", "/bin/sh", "-c", script});
  return launcher(arguments);
}

inline std::vector<std::string> sorted_lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  std::sort(lines.begin(), lines.end());
  return lines;
}

}  // namespace dualpipe::testing
