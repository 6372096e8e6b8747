#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace dualpipe::run {

/// What the command line of dualpipe-run says.
struct Options {
  int ranks = 0;  ///< on this node
  int nodes = 1;
  int node_rank = 0;
  std::string master_address = "127.0.0.1";
  int master_port = 0;  ///< 0: one node, any free port
  std::string run_id;
  std::string label = "[%r] ";  ///< stands before each line; %r is the rank
  bool prefix = true;           ///< false: ranks write to the launcher's own stdout and stderr
  bool quiet = false;
  /// From a failure to SIGTERM: the other ranks usually end by themselves, with a message that names the culprit.
  std::chrono::milliseconds wait_before_term{3000};
  std::chrono::milliseconds grace{5000};  ///< from SIGTERM to SIGKILL
  std::vector<std::string> program;       ///< with its arguments
};

/// @return nullopt when the text was only asked for help, or is wrong; `exit_code` says which and the message is
/// printed.
std::optional<Options> parse_command_line(int argc, const char* const* argv, int& exit_code);

}  // namespace dualpipe::run
