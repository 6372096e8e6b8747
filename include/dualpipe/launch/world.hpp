#pragma once

#include <functional>
#include <optional>
#include <string>

namespace dualpipe {

/// Who this process is among the ranks, as its launcher said.
struct World {
  int rank = 0;
  int size = 1;
  int local_rank = 0;
  int local_size = 1;
  std::string master_address = "127.0.0.1";
  int master_port = 0;               ///< 0: none given, fine for a world of one
  std::string run_id;                ///< tells runs and restarts that share a store apart; may be empty
  bool launcher_hosts_store = false; ///< the launcher (torchrun) already serves the store at master_address:master_port
  std::string error_file;            ///< where torchrun reads a failing rank's message; empty: nowhere

  using Lookup = std::function<std::optional<std::string>(const std::string& name)>;

  /// Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and torchrun's TORCHELASTIC_* variables; without them
  /// Slurm's; without those a world of one. The only place in the library that reads the environment.
  ///
  /// @throws InvalidArgument  a variable that is missing, malformed or out of range, quoted with its value.
  static World from_env();
  /// The same from any source of variables; `lookup` returns nullopt for an unset one.
  static World from(const Lookup& lookup);
};

}  // namespace dualpipe
