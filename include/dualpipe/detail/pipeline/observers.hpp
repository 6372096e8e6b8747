#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/comm/operation_times.hpp"
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
  /// Whether any rank has observers in the call that begins: then all ranks time their communication.
  void set_observed(Communicator& communicator, bool observed) {
    observed_ = observed;
    if (OperationTimes* const times = OperationTimes::of(communicator)) times->time_operations(observed);
  }
  /// Reports the intervals that were outstanding. Called before the vote, so that what an observer throws ends the step
  /// on all ranks. With an observer on any rank, the hosts of all ranks wait for their devices.
  ///
  /// @param world  all ranks of the call.
  void finish(Communicator& communicator, Communicator& world, const RunOutputs& outputs) const {
    if (!observed_) return;
    communicator.fence().synchronize();
    if (OperationTimes* const times = OperationTimes::of(communicator)) times->share_times(world);
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
  bool observed_ = false;
};

}  // namespace dualpipe::detail
