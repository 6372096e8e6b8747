#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "dualpipe/planner/cost_model.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::planner {

/// Which schedules to compare: every kind with every number of ranks and of micro-batches, and those given.
struct ComparisonSpec {
  std::vector<std::string> kinds = schedule_kinds();
  std::vector<int> ranks = {};
  std::vector<int> micro_batches = {};
  int chunks_per_rank = 2;  ///< interleaved only
  std::vector<Schedule> given = {};
  Publish publish = Publish::early;
  double memory_limit = std::numeric_limits<double>::infinity();  ///< of a rank, in the unit of the memory costs
  /// The number of stages that the costs describe. All rows are of one model: its costs are spread over as many stages
  /// as the schedule has. 0: as many as the costs list, else the smallest number of ranks.
  int described_stages = 0;
  std::function<void(int done, int all)> progress = {};  ///< called after each row
};

/// One row: what a schedule takes. The micro-batch has the same size in all rows.
struct ComparedSchedule {
  std::string name;  ///< the kind, or the name of a given schedule
  int num_ranks = 0;
  int num_micro_batches = 0;
  std::string refused = {};  ///< why there is no such schedule; the rest is then 0
  double makespan = 0;
  double per_micro_batch = 0;  ///< makespan / num_micro_batches: what to compare across numbers of micro-batches
  double efficiency = 0;       ///< share of the ranks' time that they compute
  double bubble = 0;           ///< of the rank that waits most
  double peak_memory = 0;      ///< of the rank that holds most, parameters and optimizer included
  double parameters = 0;       ///< of the rank that holds most; 0: not known
  int peak_activations = 0;    ///< of the rank that holds most, each of one stage and micro-batch
  std::int64_t num_transfers = 0;
  bool over_limit = false;
};

struct Comparison {
  int described_stages = 0;
  std::vector<ComparedSchedule> rows;  ///< the fastest per micro-batch first, at equal times the smallest; refused last
};

/// A combination that does not exist becomes a row that says why. Times that agree to seven digits count as equal.
///
/// @throws InvalidArgument  nothing to compare, costs that do not belong to `described_stages`, a negative limit.
Comparison compare(const ComparisonSpec& spec, const CostModel& model);

}  // namespace dualpipe::planner
