#pragma once

#include "dualpipe/detail/schedule/cost_table.hpp"

#include <algorithm>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

CostTable::CostTable(const Costs& costs, Publish publish, int num_ranks, int num_stages)
    : publish_(publish),
      pair_(costs.pair),
      send_(costs.send),
      ready_(costs.ready),
      uniform_(costs.stages.empty()),
      stages_(costs.stages),
      pairs_(num_stages),
      sends_(num_stages),
      slowdown_(costs.slowdown) {
  check(costs, num_ranks, num_stages);
  stages_.resize(num_stages, {costs.forward, costs.backward, costs.weight});
  slowdown_.resize(num_ranks, 1);
  const double apart = costs.forward + costs.backward;
  overlap_ = apart > 0 ? costs.pair / apart : 1;
  for (const PairCost& pair : costs.pairs) pairs_[pair.forward].push_back(pair);
  for (const SendCost& send : costs.sends)
    for (int boundary = 0; boundary + 1 < num_stages; ++boundary)
      if (send.boundary == SendCost::any || send.boundary == boundary) sends_[boundary].push_back(send);
}

StepTimes CostTable::times(const Step& step, int rank) const {
  const StageCosts& costs = stages_[step.op.stage];
  double duration = 0;
  double weight = 0;  // the last part, for which no other rank waits
  if (step.overlapped) {
    const bool split = step.overlapped->pass == Pass::BackwardInput;
    const double whole = pair(step.op.stage, step.overlapped->stage);
    weight = stages_[step.overlapped->stage].weight;
    constexpr double rounding = 1e-12;
    DUALPIPE_CHECK(whole >= weight * (1 - rounding), "the pair ", to_string(step), " costs ", whole,
                   ", less than the weight part that belongs to it: ", weight);
    duration = split ? std::max(0.0, whole - weight) : whole;
    if (split) weight = 0;
  } else if (step.op.pass == Pass::Backward) {
    duration = costs.backward;
    weight = costs.weight;
  } else {
    duration = step.op.pass == Pass::Forward          ? costs.forward
               : step.op.pass == Pass::BackwardWeight ? costs.weight
                                                      : costs.backward - costs.weight;
  }
  if (publish_ == Publish::atomic) weight = 0;
  const double slow = slowdown_[rank];
  const auto ready_at = [&](double fraction) {
    const bool own = publish_ == Publish::early && step.overlapped && fraction > 0;
    return slow * (own ? fraction * duration : duration - weight);
  };
  return {slow * duration, {ready_at(ready_.activation), ready_at(ready_.gradient)}};
}

double CostTable::send(int boundary, int from, int to) const {
  const auto& sends = sends_[boundary];
  for (auto send = sends.rbegin(); send != sends.rend(); ++send)
    if (send->rank_a == SendCost::any || std::minmax(send->rank_a, send->rank_b) == std::minmax(from, to))
      return send->duration;
  return send_;
}

double CostTable::pair(int forward, int backward) const {
  for (const PairCost& pair : pairs_[forward])
    if (pair.backward == backward) return pair.duration;
  if (uniform_) return pair_;
  return overlap_ * (stages_[forward].forward + stages_[backward].backward);
}

}  // namespace dualpipe::detail
