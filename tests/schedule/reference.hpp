#pragma once

// The rules of a schedule once more, in the plainest way: an independent truth for the tests. Slow, no error texts.

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe::reference {

inline std::vector<Op> ops_of(const Step& step) {
  if (!step.overlapped) return {step.op};
  return {step.op, *step.overlapped};
}

struct Costs {
  double forward = 1;
  double backward = 2;
  double weight = 1;
  double pair = 3;
  double of(const Step& step) const {
    if (step.overlapped) return pair;
    switch (step.op.pass) {
      case Pass::Forward:
        return forward;
      case Pass::Backward:
        return backward;
      case Pass::BackwardInput:
        return backward - weight;
      case Pass::BackwardWeight:
        return weight;
    }
    return 0;
  }
};

/// Runs every rank as far as it gets, results leaving a step when it ends. Nothing where some rank does not reach its
/// end, else the time at which the last one does.
inline std::optional<double> makespan(const Schedule& schedule, const Costs& costs = {}) {
  using Key = std::pair<int, int>;
  std::map<Key, double> forward, gradient;
  std::vector<std::size_t> next(schedule.ranks.size(), 0);
  std::vector<double> clock(schedule.ranks.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
      if (next[rank] == schedule.ranks[rank].size()) continue;
      const Step& step = schedule.ranks[rank][next[rank]];
      double begin = clock[rank];
      bool ready = true;
      const auto need = [&](const std::map<Key, double>& done, int stage, int micro_batch) {
        const auto found = done.find({stage, micro_batch});
        ready = ready && found != done.end();
        if (found != done.end()) begin = std::max(begin, found->second);
      };
      for (const Op& op : ops_of(step)) {
        const int s = op.stage;
        const int m = op.micro_batch;
        if (op.pass == Pass::Forward) {
          if (s > 0) need(forward, s - 1, m);
        } else if (op.pass == Pass::BackwardWeight) {
          need(gradient, s, m);
        } else {
          need(forward, s, m);
          if (s + 1 < schedule.num_stages) need(gradient, s + 1, m);
        }
      }
      if (!ready) continue;
      clock[rank] = begin + costs.of(step);
      for (const Op& op : ops_of(step)) {
        if (op.pass == Pass::Forward) forward[{op.stage, op.micro_batch}] = clock[rank];
        if (op.pass == Pass::Backward || op.pass == Pass::BackwardInput)
          gradient[{op.stage, op.micro_batch}] = clock[rank];
      }
      ++next[rank];
      moved = true;
    }
  }
  for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank)
    if (next[rank] < schedule.ranks[rank].size()) return std::nullopt;
  return *std::max_element(clock.begin(), clock.end());
}

/// Each stage and micro-batch has F and a whole backward exactly once, all on one rank.
inline bool complete(const Schedule& schedule) {
  std::map<std::pair<int, int>, std::multiset<char>> passes;
  std::map<std::pair<int, int>, std::set<std::size_t>> places;
  for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    for (const Step& step : schedule.ranks[rank]) {
      for (const Op& op : ops_of(step)) {
        passes[{op.stage, op.micro_batch}].insert(static_cast<char>(op.pass));
        places[{op.stage, op.micro_batch}].insert(rank);
      }
    }
  }
  if (passes.size() !=
      static_cast<std::size_t>(schedule.num_stages) * static_cast<std::size_t>(schedule.num_micro_batches))
    return false;
  const std::multiset<char> whole = {'F', 'B'}, split = {'F', 'I', 'W'};
  for (const auto& [key, found] : passes) {
    if (key.first < 0 || key.first >= schedule.num_stages) return false;
    if (key.second < 0 || key.second >= schedule.num_micro_batches) return false;
    if (found != whole && found != split) return false;
    if (places[key].size() != 1) return false;
  }
  return true;
}

inline bool pairs_are_forward_and_backward(const Schedule& schedule) {
  for (const auto& steps : schedule.ranks) {
    for (const Step& step : steps) {
      if (!step.overlapped) continue;
      if (step.op.pass != Pass::Forward) return false;
      if (step.overlapped->pass != Pass::Backward && step.overlapped->pass != Pass::BackwardInput) return false;
    }
  }
  return true;
}

inline bool valid(const Schedule& schedule) {
  return complete(schedule) && pairs_are_forward_and_backward(schedule) && makespan(schedule).has_value();
}

/// What a rank holds at most: forwards from their start to the end of B or I (in a pair both count), and weight parts
/// that wait.
struct Peaks {
  int activations = 0;
  int queued_weights = 0;
};

inline Peaks peaks(const std::vector<Step>& steps) {
  Peaks most;
  int activations = 0;
  int queued = 0;
  for (const Step& step : steps) {
    for (const Op& op : ops_of(step)) activations += op.pass == Pass::Forward ? 1 : 0;
    most.activations = std::max(most.activations, activations);
    for (const Op& op : ops_of(step)) {
      activations -= op.pass == Pass::Backward || op.pass == Pass::BackwardInput ? 1 : 0;
      queued += op.pass == Pass::BackwardInput ? 1 : 0;
      queued -= op.pass == Pass::BackwardWeight ? 1 : 0;
    }
    most.queued_weights = std::max(most.queued_weights, queued);
  }
  return most;
}

inline Peaks peaks(const Schedule& schedule) {
  Peaks most;
  for (const auto& steps : schedule.ranks) {
    const Peaks here = peaks(steps);
    most.activations = std::max(most.activations, here.activations);
    most.queued_weights = std::max(most.queued_weights, here.queued_weights);
  }
  return most;
}

}  // namespace dualpipe::reference
