#pragma once

#include <functional>
#include <optional>
#include <string>

namespace dualpipe {

/// Who this process is among the ranks, as its launcher said.
struct World {
  int rank = 0;
  int size = 1;
  int local_rank = 0;  ///< rank among those of this host; picks the device
  int local_size = 1;
  std::string master_address = "127.0.0.1";
  int master_port = 0;  ///< 0: none given, fine for a world of one
  std::string run_id;   ///< tells runs and restarts that share a store apart; may be empty
  bool launcher_hosts_store =
      false;               ///< the launcher (torchrun) already serves the store at master_address:master_port
  std::string error_file;  ///< where torchrun reads a failing rank's message; empty: nowhere

  using Lookup = std::function<std::optional<std::string>(const std::string& name)>;

  /// Reads, in this order:
  ///   1. RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as set by dualpipe-run and
  ///   torchrun, with
  ///      DUALPIPE_RUN_ID of the former and TORCHELASTIC_* of the latter. Without LOCAL_* all ranks are taken to be on
  ///      this host.
  ///   2. Slurm's SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_NTASKS_PER_NODE or SLURM_TASKS_PER_NODE. MASTER_ADDR
  ///   and MASTER_PORT
  ///      are used where set, else the first host of SLURM_STEP_NODELIST or SLURM_JOB_NODELIST and a port that follows
  ///      from the job id.
  ///   3. Nothing: a world of one.
  /// The only place in the library that reads the environment.
  ///
  /// @throws InvalidArgument  a variable that is missing, malformed or out of range, quoted with its value.
  static World from_env();
  /// The same from any source of variables; `lookup` returns nullopt for an unset one.
  static World from(const Lookup& lookup);
};

}  // namespace dualpipe
