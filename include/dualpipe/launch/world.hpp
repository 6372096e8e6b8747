#pragma once

#include <functional>
#include <optional>
#include <string>

namespace dualpipe {

/// Which of the ranks this process is, according to its launcher.
struct World {
  int rank = 0;
  int size = 1;
  int local_rank = 0;  ///< rank among those of this host; picks the device
  int local_size = 1;
  std::string master_address = "127.0.0.1";
  int master_port = 0;  ///< 0: none given, fine for a world of one
  std::string run_id;   ///< distinguishes runs and restarts that share a store; may be empty
  /// The launcher (torchrun) already serves the store at master_address:master_port.
  bool launcher_hosts_store = false;
  std::string error_file;  ///< where the launcher reads a failing rank's message; empty: nowhere
  /// Known to the ranks of this job only: each connection across hosts proves it. Empty: the network is trusted.
  std::string secret;

  using Lookup = std::function<std::optional<std::string>(const std::string& name)>;

  /// Reads the first of these that is set:
  ///   1. RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as dualpipe-run and torchrun set
  ///      them, with DUALPIPE_RUN_ID and DUALPIPE_ERROR_FILE of the former and TORCHELASTIC_* of the latter. Without
  ///      LOCAL_* all ranks are taken to be on this host.
  ///   2. Slurm's SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_NTASKS_PER_NODE or SLURM_TASKS_PER_NODE. MASTER_ADDR
  ///      and MASTER_PORT are used if set; otherwise the first host of SLURM_STEP_NODELIST or SLURM_JOB_NODELIST, and a
  ///      port computed from the job id.
  ///   3. Neither: a world of one.
  /// With 1 and 2, DUALPIPE_SECRET_FILE names a file with the secret, which dualpipe-run makes itself on one host. Only
  /// this user or root may own it, nobody else may read or write it; 16 to 4096 bytes, a newline at the end not counted.
  /// All of the world comes from here; LibTorch, NCCL and dualpipe::nccl also read variables of NCCL.
  ///
  /// @throws InvalidArgument  a variable that is missing, malformed or out of range, quoted with its value; a file of
  /// the secret that others may read.
  static World from_env();
  /// The same from any source of variables; `lookup` returns nullopt for an unset one.
  static World from(const Lookup& lookup);
};

}  // namespace dualpipe
