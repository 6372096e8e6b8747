#pragma once

#include "dualpipe/detail/pipeline/recorder.hpp"

#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "dualpipe/detail/error_text.hpp"

namespace dualpipe::detail {

Mark Recorder::mark() const {
  if (!on()) return {};
  if (trace_ != nullptr) return {0, trace_->mark()};
  return {std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(), nullptr};
}

void Recorder::record(Lane lane, const Step& step, const Mark& begin, const Mark& end, std::string node) {
  if (on()) add({{rank_, lane, step, 0, 0, std::move(node)}, begin, end, {}});
}

void Recorder::record(Lane lane, const Step& step, const Pending& pending, std::string node) {
  if (on()) add({{rank_, lane, step, 0, 0, std::move(node)}, {}, {}, pending});
}

void Recorder::add(Late late) {
  // What a device does comes in order, and its transfers have their times after share_times(): all of it comes later.
  if (trace_ == nullptr && known(late)) {
    tell(late);
  } else {
    late_.push_back(std::move(late));
  }
}

void Recorder::tell(Late& late) const {
  const Span span = late.pending ? late.pending.span() : Span{late.begin.seconds(), late.end.seconds()};
  if (late.interval.lane == Lane::collective && span.end <= span.begin) return;
  late.interval.begin = span.begin;
  late.interval.end = span.end;
  try {
    for (const auto& observer : observers_) observer->record(late.interval);
  } catch (...) {
    const std::string text = current_error_text();
    std::throw_with_nested(Error(str("an observer threw when it was told of ", to_string(late.interval.step),
                                     late.interval.node.empty() ? "" : " " + late.interval.node, ": ", text)));
  }
}

void Recorder::finish() {
  for (Late& late : std::exchange(late_, {})) {
    while (!known(late)) std::this_thread::sleep_for(std::chrono::microseconds(50));
    tell(late);
  }
}

}  // namespace dualpipe::detail
