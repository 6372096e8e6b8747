#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "dualpipe/detail/schedule/cost_table.hpp"
#include "dualpipe/planner/search.hpp"

namespace dualpipe::detail {

/// Micro-batches that take the same route through the ranks, and therefore cost the same everywhere.
struct PipelineRoute {
  std::vector<int> ranks;          // by stage
  std::vector<int> micro_batches;  // ascending
};

/// What the search does not change: placement, costs and limits.
struct SearchProblem {
  int num_ranks = 0, num_stages = 0, num_micro_batches = 0;
  Publish publish = Publish::early;
  std::vector<PipelineRoute> routes;
  std::vector<int> route_of;  // by micro-batch
  Costs costs;
  CostTable table;
  std::vector<planner::StageMemory> memory;  // by stage
  std::vector<std::vector<int>> stages_of;   // by rank, ascending
  planner::SearchLimits limits;

  /// @param ranks  as `placement` gives them. @throws InvalidArgument  costs that do not fit; not all places are taken.
  SearchProblem(int num_ranks, int num_stages, int num_micro_batches, const std::vector<int>& ranks,
                const planner::CostModel& model, const planner::SearchOptions& options);
  double state_of(int rank) const;  ///< memory that the stages of a rank always take
};

/// Micro-batches of one route are alike, so an order need only say which pass of which route and stage comes next: the
/// k-th such pass is taken to be the k-th micro-batch's. Nothing is lost: renaming the passes of any order like this
/// keeps it executable, since where k forwards of stage s were done before one of stage s + 1, its k-th is, and so on.
class Numbering {
 public:
  explicit Numbering(const SearchProblem& problem);

  /// Names the micro-batches of the steps of one rank by their turns.
  ///
  /// @return  false: a backward before its forward, a W before its I, or more held than the limits let there be.
  bool operator()(std::vector<Step>& steps, int rank);

 private:
  std::int64_t line(const Op& op) const;

  const SearchProblem& problem_;
  struct Line {
    int forwards = 0, backwards = 0, weights = 0;
    std::vector<int> waiting;  // micro-batches of I, in order
  };
  std::vector<Line> lines_;  // by route and stage
};

planner::LowerBound lower_bound(const SearchProblem& problem);

/// How a list schedule chooses; each combination is another order.
struct ListRule {
  bool pairs = true;    ///< a forward and a backward that are both ready run as a pair
  bool split = true;    ///< a backward as I, while another weight part may wait
  bool deepest = true;  ///< among forwards, the later stage first; else the one whose route has advanced less
  int in_flight = 0;    ///< micro-batches on their way at once; 0: no limit, and the ranks may block each other
};

/// Simulates the ranks; whoever is free takes what is ready, backwards before forwards before weight parts.
///
/// @return  nothing: the ranks blocked each other.
std::optional<Schedule> list_schedule(const SearchProblem& problem, const ListRule& rule);

}  // namespace dualpipe::detail
