#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"
#include "dualpipe/detail/pipeline/recorder.hpp"
#include "dualpipe/pipeline/observer.hpp"

namespace dualpipe::detail {

/// The observers of one pipeline.
class Observers {
 public:
  void add(std::shared_ptr<Observer> observer) { all_.push_back(std::move(observer)); }
  const std::vector<std::shared_ptr<Observer>>& all() const noexcept { return all_; }

  void begin(std::int64_t step) const {
    for (const auto& observer : all_) {
      const std::string error = finding_of([&] { observer->begin(step); });
      if (!error.empty()) throw Error(str("an observer threw at the beginning of step ", step, ": ", error));
    }
  }
  /// Reports the intervals that were outstanding. Called before the vote, so that what an observer throws ends the step
  /// on all ranks. With any observer the host waits for the device.
  void finish(Communicator& communicator, const RunOutputs& outputs) const {
    if (all_.empty()) return;
    communicator.fence().synchronize();
    outputs.recorder->finish();
  }
  /// Comes after the vote, so what an observer throws is kept.
  void end(std::int64_t step, bool committed) {
    for (const auto& observer : all_) {
      const std::string error = finding_of([&] { observer->end(committed); });
      if (!error.empty() && committed)
        kept_ = str("an observer threw at the end of step ", step, ", which was committed: ", error);
    }
  }
  /// What end() has kept since the last time; empty: nothing.
  std::string take_error() { return std::exchange(kept_, {}); }

 private:
  std::vector<std::shared_ptr<Observer>> all_;
  std::string kept_;
};

}  // namespace dualpipe::detail
