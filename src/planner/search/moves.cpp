#include "planner/search/moves.hpp"

#include <algorithm>
#include <array>
#include <cstddef>

#include "dualpipe/detail/schedule/dependencies.hpp"

namespace dualpipe::detail {
namespace {

using Steps = std::vector<Step>;

bool is_single(const Step& step, Pass pass) { return !step.overlapped && step.op.pass == pass; }

/// Mostly one place, sometimes far.
int distance(Random& random) {
  static constexpr std::array<int, 8> distances = {1, 1, 1, 1, 2, 2, 3, 4};
  return random.below(8) == 0 ? 1 + random.below(16) : distances[random.below(distances.size())];
}

/// The steps [at, at + length) to another place, `by` steps away.
bool shift(Steps& steps, int at, int length, int by) {
  const auto size = static_cast<int>(steps.size());
  length = std::min(length, size - at);
  const int to = std::clamp(at + by, 0, size - length);
  const auto begin = steps.begin();
  if (to < at)
    std::rotate(begin + to, begin + at, begin + at + length);
  else
    std::rotate(begin + at, begin + at + length, begin + to + length);
  return to != at;
}

/// Swaps two steps: the number of activations held need not change.
bool exchange(Steps& steps, int at, int with) {
  if (with < 0 || with >= static_cast<int>(steps.size())) return false;
  std::swap(steps[at], steps[with]);
  return true;
}

/// Mostly one step, sometimes several that belong together, as a forward and its backward.
int length(Random& random) { return random.below(4) == 0 ? 2 + random.below(3) : 1; }

/// A pair into its halves, in either order; a B into I and a W that comes later.
bool part(Steps& steps, int at, Random& random) {
  const Step step = steps[at];
  if (step.overlapped) {
    const bool forward_first = random.below(2) == 0;
    const Step forward{step.op, std::nullopt}, backward{*step.overlapped, std::nullopt};
    steps[at] = forward_first ? forward : backward;
    steps.insert(steps.begin() + at + 1, forward_first ? backward : forward);
    return true;
  }
  if (step.op.pass != Pass::Backward) return false;
  steps[at].op.pass = Pass::BackwardInput;
  const int to = std::min(at + distance(random), static_cast<int>(steps.size()) - 1);
  steps.insert(steps.begin() + to + 1, Step{{Pass::BackwardWeight, step.op.stage, step.op.micro_batch}, std::nullopt});
  return true;
}

/// The backward of a pair into I and a W that comes later.
bool part_backward(Steps& steps, int at, Random& random) {
  Step& step = steps[at];
  if (!step.overlapped || step.overlapped->pass != Pass::Backward) return false;
  step.overlapped->pass = Pass::BackwardInput;
  const Op weight{Pass::BackwardWeight, step.overlapped->stage, step.overlapped->micro_batch};
  const int to = std::min(at + distance(random), static_cast<int>(steps.size()) - 1);
  steps.insert(steps.begin() + to + 1, Step{weight, std::nullopt});
  return true;
}

/// A forward and a backward that are neighbours into a pair; an I and the next W of its stage into a B.
bool join(Steps& steps, int at) {
  Step& step = steps[at];
  const auto size = static_cast<int>(steps.size());
  if (at + 1 < size && !step.overlapped && !steps[at + 1].overlapped) {
    const Op next = steps[at + 1].op;
    const bool forward_first = step.op.pass == Pass::Forward && is_backward(next.pass);
    if (forward_first || (next.pass == Pass::Forward && is_backward(step.op.pass))) {
      step = forward_first ? Step{step.op, next} : Step{next, step.op};
      steps.erase(steps.begin() + at + 1);
      return true;
    }
  }
  Op& backward = step.overlapped ? *step.overlapped : step.op;
  if (backward.pass != Pass::BackwardInput) return false;
  for (int i = at + 1; i < size; ++i)
    if (is_single(steps[i], Pass::BackwardWeight) && steps[i].op.stage == backward.stage &&
        steps[i].op.micro_batch == backward.micro_batch) {
      backward.pass = Pass::Backward;
      steps.erase(steps.begin() + i);
      return true;
    }
  return false;
}

}  // namespace

std::vector<CriticalStep> critical_steps(const Schedule& schedule, const Simulator& simulator,
                                         const SearchProblem& problem, Random& random) {
  const auto& nodes = simulator.nodes();
  const auto& begins = simulator.begins();
  std::vector<std::vector<int>> node_of(schedule.ranks.size());
  int last = 0;
  const auto end_of = [&](int node) { return begins[node] + nodes[node].duration; };
  for (int i = 0; i < static_cast<int>(nodes.size()); ++i) {
    node_of[nodes[i].rank].push_back(i);  // in the order of `at`
    if (end_of(i) > end_of(last)) last = i;
  }

  constexpr double rounding = 1e-9;
  std::vector<CriticalStep> critical;
  for (int node = last; begins[node] > 0;) {
    const int rank = nodes[node].rank, at = nodes[node].at;
    const double begin = begins[node];
    int before = -1, producer = -1;
    if (at > 0 && end_of(node_of[rank][at - 1]) >= begin * (1 - rounding)) before = node_of[rank][at - 1];
    const Step& step = schedule.ranks[rank][at];
    for (const Op* op : {&step.op, step.overlapped ? &*step.overlapped : nullptr}) {
      if (op == nullptr || op->pass == Pass::BackwardWeight) continue;
      const bool forward = op->pass == Pass::Forward;
      const int from_stage = forward ? op->stage - 1 : op->stage + 1;
      if (from_stage < 0 || from_stage == problem.num_stages) continue;
      const int from = problem.routes[problem.route_of[op->micro_batch]].ranks[from_stage];
      const int candidate = node_of[from][simulator.step_of(!forward, from_stage, op->micro_batch)];
      const Simulator::Node& made = nodes[candidate];
      const int which = schedule.ranks[from][made.at].overlapped && !forward ? 1 : 0;
      if (begins[candidate] + made.ready[which] + made.send[which] >= begin * (1 - rounding)) producer = candidate;
    }
    if (before >= 0) critical.push_back({rank, at});
    if (before < 0 && producer < 0) break;  // happens by rounding only
    node = producer < 0 || (before >= 0 && random.below(2) == 0) ? before : producer;
  }
  return critical;
}

int propose(const Schedule& schedule, const std::vector<CriticalStep>& critical, Random& random,
            std::vector<Step>& steps) {
  CriticalStep critical_step;
  if (!critical.empty() && random.below(8) != 0) {
    critical_step = critical[random.below(critical.size())];
  } else {
    critical_step.rank = random.below(schedule.ranks.size());
    if (schedule.ranks[critical_step.rank].size() < 2) return -1;
    critical_step.at = 1 + random.below(schedule.ranks[critical_step.rank].size() - 1);
  }
  steps = schedule.ranks[critical_step.rank];
  if (critical_step.at >= static_cast<int>(steps.size())) return -1;  // an index from before another change
  const int at = critical_step.at, before = at - 1;
  bool changed = false;
  switch (random.below(12)) {
    case 0:
    case 1:
    case 2:
      changed = shift(steps, at, length(random), -distance(random));
      break;
    case 3:
    case 4:
      changed = shift(steps, before, length(random), distance(random));
      break;
    case 5:
    case 6:
      changed = exchange(steps, at, at + (random.below(4) == 0 ? distance(random) : -distance(random)));
      break;
    case 7:
      changed = part(steps, at, random);
      break;
    case 8:
      changed = part(steps, before, random);
      break;
    case 9:
      changed = part_backward(steps, random.below(2) == 0 ? at : before, random);
      break;
    default:
      changed = join(steps, random.below(2) == 0 ? at : before);
  }
  return changed ? critical_step.rank : -1;
}

}  // namespace dualpipe::detail
