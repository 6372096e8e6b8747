#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "planner/search/problem.hpp"

namespace dualpipe::detail {
namespace {

constexpr double infinite = std::numeric_limits<double>::infinity();

/// The shortest durations of a stage on its rank.
struct Shortest {
  double forward = infinite;       ///< from the begin of F until another rank may be sent the result
  double forward_here = infinite;  ///< until the end of the step, when the same rank has it
  double gradient = infinite, gradient_here = infinite;
  double backward = infinite;  ///< until the weight part is done too
};

class Bounds {
 public:
  explicit Bounds(const SearchProblem& problem) : problem_(problem) {}

  planner::LowerBound largest() const {
    planner::LowerBound best;
    for (const PipelineRoute& route : problem_.routes) {
      const double alone = arrival(route, problem_.num_stages - 1) + back_from_last(route, 0) + finish(route);
      if (alone > best.makespan) best = {.makespan = alone, .rank = -1, .head = 0, .busy = alone, .tail = 0};
    }
    for (int rank = 0; rank < problem_.num_ranks; ++rank) {
      if (problem_.stages_of[rank].empty()) continue;
      for (const planner::LowerBound& bound : {by_work(rank), by_memory(rank)})
        if (bound.makespan > best.makespan) best = bound;
    }
    return best;
  }

 private:
  StepTimes times(Pass pass, int stage, int rank) const {
    return problem_.table.times({{pass, stage, 0}, std::nullopt}, rank);
  }
  StepTimes pair(int forward, Pass pass, int backward, int rank) const {
    return problem_.table.times({{Pass::Forward, forward, 0}, Op{pass, backward, 0}}, rank);
  }
  bool may_split() const { return problem_.limits.weights > 0; }

  Shortest shortest(int stage, int rank) const {
    Shortest result;
    const auto forward = [&](const StepTimes& step) {
      result.forward = std::min(result.forward, step.ready[0]);
      result.forward_here = std::min(result.forward_here, step.duration);
    };
    const auto gradient = [&](const StepTimes& step, int which, double weight_after) {
      result.gradient = std::min(result.gradient, step.ready[which]);
      result.gradient_here = std::min(result.gradient_here, step.duration);
      result.backward = std::min(result.backward, step.duration + weight_after);
    };
    const double weight = times(Pass::BackwardWeight, stage, rank).duration;
    forward(times(Pass::Forward, stage, rank));
    gradient(times(Pass::Backward, stage, rank), 0, 0);
    if (may_split()) gradient(times(Pass::BackwardInput, stage, rank), 0, weight);
    for (const int other : problem_.stages_of[rank]) {
      forward(pair(stage, Pass::Backward, other, rank));
      gradient(pair(other, Pass::Backward, stage, rank), 1, 0);
      if (!may_split()) continue;
      forward(pair(stage, Pass::BackwardInput, other, rank));
      gradient(pair(other, Pass::BackwardInput, stage, rank), 1, weight);
    }
    return result;
  }

  /// From the begin of the route until F of `stage` may begin.
  double arrival(const PipelineRoute& route, int stage) const {
    double time = 0;
    for (int s = 0; s < stage; ++s) {
      const Shortest here = shortest(s, route.ranks[s]);
      const bool same = route.ranks[s] == route.ranks[s + 1];
      time += same ? here.forward_here : here.forward + problem_.table.send(s, route.ranks[s], route.ranks[s + 1]);
    }
    return time;
  }

  /// From the begin of the backward of `from` until that of `to`, a stage below.
  double descent(const PipelineRoute& route, int from, int to) const {
    double time = 0;
    for (int s = from; s > to; --s) {
      const Shortest here = shortest(s, route.ranks[s]);
      const bool same = route.ranks[s] == route.ranks[s - 1];
      time +=
          same ? here.gradient_here : here.gradient + problem_.table.send(s - 1, route.ranks[s], route.ranks[s - 1]);
    }
    return time;
  }

  /// From the begin of F of the last stage until the backward of `stage` may begin.
  double back_from_last(const PipelineRoute& route, int stage) const {
    const int last = problem_.num_stages - 1;
    return shortest(last, route.ranks[last]).forward_here + descent(route, last, stage);
  }

  /// The backward of stage 0, weight part included.
  double finish(const PipelineRoute& route) const { return shortest(0, route.ranks[0]).backward; }

  /// From when `stage` has published its gradient until the end of its micro-batch.
  double after(const PipelineRoute& route, int stage) const {
    if (stage == 0) return 0;
    const bool same = route.ranks[stage] == route.ranks[stage - 1];
    return (same ? 0 : problem_.table.send(stage - 1, route.ranks[stage], route.ranks[stage - 1])) +
           descent(route, stage - 1, 0) + finish(route);
  }

  template <class Visit>
  void for_each_line(int rank, const Visit& visit) const {
    for (const PipelineRoute& route : problem_.routes)
      for (const int stage : problem_.stages_of[rank])
        if (route.ranks[stage] == rank) visit(route, stage, static_cast<double>(route.micro_batches.size()));
  }

  double head(int rank) const {
    double earliest = infinite;
    for_each_line(rank, [&](const PipelineRoute& route, int stage, double) {
      earliest = std::min(earliest, arrival(route, stage));
    });
    return earliest;
  }

  double busy(int rank) const {
    // What a forward saves at most in a pair, with the backward that suits it best, and the other way round.
    const auto saved = [&](int forward, int backward) {
      const double apart =
          times(Pass::Forward, forward, rank).duration + times(Pass::Backward, backward, rank).duration;
      return std::max(0.0, apart - pair(forward, Pass::Backward, backward, rank).duration);
    };
    double total = 0, by_forward = 0, by_backward = 0, least_forward = infinite, least_backward = infinite;
    for_each_line(rank, [&](const PipelineRoute&, int stage, double count) {
      total += count * (times(Pass::Forward, stage, rank).duration + times(Pass::Backward, stage, rank).duration);
      double as_forward = 0, as_backward = 0;
      for (const int other : problem_.stages_of[rank]) {
        as_forward = std::max(as_forward, saved(stage, other));
        as_backward = std::max(as_backward, saved(other, stage));
      }
      by_forward += count * as_forward;
      by_backward += count * as_backward;
      least_forward = std::min(least_forward, as_forward);
      least_backward = std::min(least_backward, as_backward);
    });
    return total - std::min(by_forward - least_forward, by_backward - least_backward);
  }

  planner::LowerBound by_work(int rank) const {
    double way_down = infinite, rest = 0, weight = 0;
    for_each_line(rank, [&](const PipelineRoute& route, int stage, double) {
      way_down = std::min(way_down, after(route, stage));
      weight = std::max(weight, times(Pass::BackwardWeight, stage, rank).duration);
      const StepTimes alone = times(Pass::Backward, stage, rank);
      rest = std::max(rest, alone.duration - alone.ready[0]);
      for (const int other : problem_.stages_of[rank])
        for (const Pass pass : {Pass::Backward, Pass::BackwardInput}) {
          const StepTimes both = pair(other, pass, stage, rank);
          rest = std::max(rest, both.duration - both.ready[1]);
        }
    });
    planner::LowerBound bound{.makespan = 0, .rank = rank, .head = head(rank), .busy = busy(rank)};
    bound.tail = std::max(0.0, way_down - rest - weight * problem_.limits.weights);
    bound.makespan = bound.head + bound.busy + bound.tail;
    return bound;
  }

  planner::LowerBound by_memory(int rank) const {
    double counted = 0, sized = 0;
    for_each_line(rank, [&](const PipelineRoute& route, int stage, double count) {
      const Shortest here = shortest(stage, route.ranks[stage]);
      const int last = problem_.num_stages - 1;
      const double there = stage == last ? here.forward_here
                                         : arrival(route, last) - arrival(route, stage) + back_from_last(route, stage);
      const double time = count * (there + here.gradient_here);
      counted += time;
      sized += time * problem_.memory[stage].activation;
    });
    planner::LowerBound bound{.makespan = 0, .rank = rank, .head = head(rank), .by_memory = true};
    bound.busy = counted / problem_.limits.activations;
    const double room = problem_.limits.memory - problem_.state_of(rank);
    if (std::isfinite(room) && room > 0) bound.busy = std::max(bound.busy, sized / room);
    bound.makespan = bound.head + bound.busy;
    return bound;
  }

  const SearchProblem& problem_;
};

}  // namespace

planner::LowerBound lower_bound(const SearchProblem& problem) { return Bounds(problem).largest(); }

}  // namespace dualpipe::detail
