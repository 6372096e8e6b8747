#pragma once

#include <array>
#include <vector>

#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::detail {

/// A step on its rank: how long it takes and, from its begin, when the results of its op and of its overlapped op are
/// published to other ranks.
struct StepTimes {
  double duration = 0;
  std::array<double, 2> ready{};
};

/// Costs by where they are asked for.
class CostTable {
 public:
  /// @throws InvalidArgument  costs that do not fit this many ranks and stages.
  CostTable(const Costs& costs, Publish publish, int num_ranks, int num_stages);

  /// @throws InvalidArgument  a pair that costs less than its weight part.
  StepTimes times(const Step& step, int rank) const;
  /// Between two ranks, over the boundary between the stages `boundary` and `boundary` + 1.
  double send(int boundary, int from, int to) const;

 private:
  double pair(int forward, int backward) const;

  Publish publish_;
  double pair_, send_;
  PairReady ready_;
  bool uniform_;
  std::vector<StageCosts> stages_;
  double overlap_;                            // what a pair costs, of what its halves cost
  std::vector<std::vector<PairCost>> pairs_;  // by stage of the forward
  std::vector<std::vector<SendCost>> sends_;  // by boundary
  std::vector<double> slowdown_;              // by rank
};

}  // namespace dualpipe::detail
