#pragma once

#include "dualpipe/pipeline/pair.hpp"

namespace dualpipe {

std::optional<PairEvent> PairRun::next() {
  for (const PairSide side : {PairSide::forward, PairSide::backward}) {
    Half& here = half(side);
    if (here.trails() && here.run->under_way().done()) return settle(side);
    if (!here.ended()) continue;
    here.over = true;
    at_ = {side, -1};
    return PairEvent{PairEvent::Kind::over, at_};
  }
  const PairOp* const next = op();
  if (next == nullptr) return std::nullopt;
  StageRun& run = *half(next->side).run;
  if (next->side == PairSide::weight) {
    at_ = *next;
    run.backward_weight(next->node);
    ++position_;
    return PairEvent{PairEvent::Kind::computed, *next};
  }
  if (run.under_way()) {
    if (!run.under_way().done()) return PairEvent{PairEvent::Kind::must_wait, *next};
    return settle(next->side);
  }
  at_ = *next;
  run.advance();
  ++position_;
  return PairEvent{run.under_way() ? PairEvent::Kind::launched : PairEvent::Kind::computed, *next};
}

PairEvent PairRun::wait() {
  if (const PairOp* const next = op()) return settle(next->side);
  return settle(forward_.trails() ? PairSide::forward : PairSide::backward);
}

const PairOp* PairRun::upcoming() const {
  const PairOp* const next = op();
  if (next == nullptr || forward_.has_news() || backward_.has_news()) return nullptr;
  if (next->side == PairSide::weight) return next;
  const Half& here = next->side == PairSide::forward ? forward_ : backward_;
  return here.run->under_way() ? nullptr : next;
}

PairEvent PairRun::settle(PairSide side) {
  StageRun& run = *half(side).run;
  const Pending pending = run.under_way();
  at_ = {side, -1};
  run.settle();
  return {PairEvent::Kind::received, {side, run.node()}, pending};
}

void run_pair(const std::vector<PairOp>& order, StageRun* forward, StageRun* backward) {
  PairRun pair(order, forward, backward);
  while (const std::optional<PairEvent> event = pair.next())
    if (event->kind == PairEvent::Kind::must_wait) pair.wait();
  while (pair.trails()) pair.wait();
}

}  // namespace dualpipe
