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

/// What a rank may hold at once. A pair holds the activations of both of its halves.
struct SearchLimits {
  int activations = 0;  ///< 0: as many as the published order of the kind, or the given schedule, holds
  int weights = -1;     ///< weight parts that wait (I done, W not yet); negative: as many as that order lets wait
  double memory = std::numeric_limits<double>::infinity();  ///< in the unit of the memory costs, state included
};

struct SearchProgress {
  std::int64_t evaluations = 0;
  std::int64_t budget = 0;
  double seconds = 0;
  double best = 0;   ///< makespan
  double bound = 0;  ///< no order is faster
};

struct SearchOptions {
  Publish publish = Publish::early;
  SearchLimits limits = {};
  std::int64_t evaluations =
      0;  ///< orders to simulate; with the seed it decides the result. 0: as many as some seconds allow
  /// The longest duration; 0: unlimited. Without a number of evaluations this is the budget, and the result depends on
  /// the speed of the machine.
  double seconds = 0;
  std::uint64_t seed = 1;
  /// Called ten times a second from the calling thread; false ends the search with what it has.
  std::function<bool(const SearchProgress&)> progress = {};
};

/// A makespan that no order with this placement, these costs and limits can beat.
///
/// For each rank r the bound is head + busy + tail. head: nothing can be computed on r before the first activation has
/// come through the stages ahead of the nearest of its own. busy: all of its ops, with every forward but the first
/// paired with the backward that saves most (the first forward has no backward beside it, since all of the rank's
/// backwards need a forward before them). tail: after r has published its last input gradient, the stages below still
/// have to compute theirs, one after the other, and stage 0 its weight part; meanwhile r itself can only finish that
/// step and the weight parts that wait, of which the limit lets there be only so many, so what of the way down is
/// longer than these is time in which r does nothing.
///
/// With a limit on what is held, another bound: an activation is held at least for its micro-batch's way from its stage
/// to the last one and back, so the sum of these times over all that r runs, each with its size, fits into
/// limit * (makespan - head).
///
/// The bound of the schedule is the largest of these, or the time that one micro-batch takes alone. Chains are taken
/// with the shortest time in which any step, single or paired, could hand the result on.
struct LowerBound {
  double makespan = 0;
  int rank = -1;  ///< whose bound it is; -1: the way of one micro-batch
  double head = 0, busy = 0, tail = 0;
  bool by_memory = false;  ///< the second bound; `busy` is then the time for which the limit lets everything be held
};

/// An order that the search began with.
struct SearchStart {
  std::string name;  ///< a kind, "list schedule", or the name of a given schedule
  double makespan = 0;
  bool fits = true;       ///< within the limits
  bool published = true;  ///< made by a generator or given; false: by the search itself
};

struct SearchResult {
  Schedule schedule;
  double makespan = 0;
  LowerBound bound;
  SearchLimits limits;              ///< those that held, defaults filled in
  std::vector<SearchStart> starts;  ///< the first: the published order of the kind, or the given schedule
  std::int64_t evaluations = 0;
  double seconds = 0;
};

/// Stages of a schedule of this kind and numbers, also where the kind has no order for them.
int num_stages(const ScheduleSpec& spec);

/// Looks for a faster order of the same work with the same placement: bidirectional (dualpipe), folded (dualpipev,
/// zbv), one way (1f1b, zb1p, gpipe) or in turns (interleaved). Begins with the published orders of that placement and
/// with list schedules, then changes the best step by step (an op earlier or later on its rank, pairs joined and
/// parted, B divided into I and W and put together again), by simulated annealing with an eye on the critical path. The
/// result is never worse than the best start that fits the limits, and has passed `check` and `dry_run`.
///
/// Any numbers of ranks and micro-batches, also those for which the kind has no published order.
///
/// @param model  costs of the stages that the schedule has (see `spread`).
/// @throws InvalidArgument  costs that do not fit, limits within which there is no order at all.
SearchResult search(const ScheduleSpec& spec, const CostModel& model, const SearchOptions& options = {});
/// From this schedule, with its placement.
SearchResult search(const Schedule& start, const CostModel& model, const SearchOptions& options = {});

}  // namespace dualpipe::planner
