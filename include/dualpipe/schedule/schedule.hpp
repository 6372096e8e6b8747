#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/op.hpp"

namespace dualpipe {

/// The order of work of one training step, as data: what each rank does, first to last.
struct Schedule {
  std::string name;
  int num_stages = 0;
  int num_micro_batches = 0;
  std::vector<std::vector<Step>> ranks;  ///< ranks[r]: the steps of rank r, in order
  bool operator==(const Schedule&) const = default;
};

/// One CSV row per rank, one cell per step, in the text form of torch.distributed.pipelining.
DUALPIPE_DECL std::string to_csv(const Schedule& schedule);

/// Reads to_csv's form, and what torch dumps: CRLF line ends, empty cells (idle slots) and empty lines at the end are
/// accepted, and the actions that torch's lowering adds (SEND_F, RECV_F, SEND_B, RECV_B, UNSHARD, RESHARD, REDUCE_GRAD)
/// are skipped, since `lower` derives its own. Numbers of stages and micro-batches are the highest named plus one.
/// A byte-order mark and cells in quotes, as spreadsheets write them, are accepted. Reads only; `check` proves.
///
/// Torch's older notation is read as well: B for the input part of a backward, now I, and BW for the whole, now B. A
/// file has it where a cell has BW, or where there is no I and every B has a W of its stage and micro-batch.
///
/// @throws InvalidArgument  naming row (the rank) and cell, both counted from 1 and idle cells included; also where the
///                          two notations are mixed.
DUALPIPE_DECL Schedule from_csv(std::string_view text, std::string name = "custom");

/// Where everything runs: the rank of `stage` and `micro_batch` is at [stage * num_micro_batches + micro_batch], -1
/// where no rank does.
///
/// @throws InvalidArgument  if the table would be larger than the schedule, or an op lies outside of it.
DUALPIPE_DECL std::vector<int> placement(const Schedule& schedule);

/// The rank that runs micro-batch `micro_batch` of `stage`. Searches: who asks often takes `placement`.
/// @throws InvalidArgument  where no rank does.
DUALPIPE_DECL int rank_of(const Schedule& schedule, int stage, int micro_batch);

/// Ranks that hold a copy of the stage, ascending.
DUALPIPE_DECL std::vector<int> holders(const Schedule& schedule, int stage);

/// Those of all stages, by stage. Who asks for many takes this: either one reads the whole schedule.
DUALPIPE_DECL std::vector<std::vector<int>> holders(const Schedule& schedule);

/// Stages that a rank holds, ascending. @throws InvalidArgument  if there is no such rank.
DUALPIPE_DECL std::vector<int> stages_of(const Schedule& schedule, int rank);

/// The part of the grid around one cell, for messages: ranks and cells at most `radius` away, a row per rank, a pair as
/// 0F7&7B3, and the cell marked as in "[2F0] ... <-- here". Cells are numbered from 1 in the head line. Empty where
/// there is no such rank; a `cell` outside of the row marks only the row.
///
/// @param cell     index into ranks[rank].
/// @param numbers  of the ranks, as they are printed; empty: those of the schedule.
DUALPIPE_DECL std::string cells_around(const Schedule& schedule, int rank, int cell, int radius,
                                       const std::vector<int>& numbers = {});

/// Only the forwards, for `num_micro_batches` micro-batches (any number >= 1): micro-batch m is placed like micro-batch
/// m*N/M of `training`, so both directions stay in use, and each rank runs its forwards in the order in which they
/// become ready.
DUALPIPE_DECL Schedule forward_only(const Schedule& training, int num_micro_batches);

/// The same order for fewer micro-batches: of N only M are left, where micro-batch m is what m*N/M was, so that all
/// directions stay in use. It can be run where `schedule` can, as micro-batches do not wait for each other, and holds no
/// more activations.
///
/// @param num_micro_batches  1 to N.
DUALPIPE_DECL Schedule with_fewer(const Schedule& schedule, int num_micro_batches);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/csv.ipp"
#include "dualpipe/detail/schedule/schedule.ipp"
#endif
