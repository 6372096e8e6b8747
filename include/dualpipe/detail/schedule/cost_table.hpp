#pragma once

#include <array>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/op.hpp"
#include "dualpipe/schedule/transfer.hpp"

namespace dualpipe::detail {

/// The times of a step on its rank: its duration, and when the results of its op and of its overlapped op leave for
/// other ranks, counted from its begin.
struct StepTimes {
  double duration = 0;
  std::array<double, 2> ready{};
};

/// Looks up durations by step, rank and boundary.
class CostTable {
 public:
  /// @throws InvalidArgument  costs that do not fit this many ranks and stages.
  DUALPIPE_DECL CostTable(const Costs& costs, Publish publish, int num_ranks, int num_stages);

  /// @throws InvalidArgument  a pair that costs less than its weight part.
  DUALPIPE_DECL StepTimes times(const Step& step, int rank) const;
  /// Between two ranks, over the boundary between the stages `boundary` and `boundary` + 1.
  DUALPIPE_DECL double send(int boundary, int from, int to) const;

 private:
  DUALPIPE_DECL double pair(int forward, int backward) const;

  Publish publish_;
  double pair_, send_;
  PairReady ready_;
  bool uniform_;
  std::vector<StageCosts> stages_;
  double overlap_;                            // duration of a pair / duration of its two ops
  std::vector<std::vector<PairCost>> pairs_;  // by stage of the forward
  std::vector<std::vector<SendCost>> sends_;  // by boundary
  std::vector<double> slowdown_;              // by rank
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/cost_table.ipp"
#endif
