#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/comm/device_trace.hpp"
#include "dualpipe/pipeline/observer.hpp"

namespace dualpipe {

/// A moment of the rank's work: of its host, or of its device where work runs later there.
struct Mark {
  double host = 0;
  std::shared_ptr<const Moment> device;

  bool reached() const { return device == nullptr || device->reached(); }
  double seconds() const { return device == nullptr ? host : device->seconds(); }
};

/// Tells a run's observers what happened when: at once on the CPU, what a device or a transfer is still about to do
/// when finish() is called.
class Recorder {
 public:
  struct PopRange {
    void operator()(DeviceTrace* trace) const { trace->pop_range(); }
  };
  /// A named range in a profiler's view of the device, for as long as it lives; null where there is no device.
  using Range = std::unique_ptr<DeviceTrace, PopRange>;

  Recorder(Communicator& communicator, std::vector<std::shared_ptr<Observer>> observers)
      : rank_(communicator.rank()), trace_(communicator.device_trace()), observers_(std::move(observers)) {}

  /// Whether anybody listens.
  bool on() const { return !observers_.empty(); }
  /// Now, as the work that was asked for so far is concerned. Costs nothing while nobody listens.
  Mark mark() const;
  /// @param name  gives it; called only where it is used.
  template <class Name>
  Range range(const Name& name) const {
    if (trace_ != nullptr) trace_->push_range(name());
    return Range(trace_);
  }

  void record(Lane lane, const Step& step, const Mark& begin, const Mark& end, std::string node = {});
  /// The time in which a communication was under way.
  void record(Lane lane, const Step& step, const Pending& pending, std::string node = {});

  /// The rest, in the order in which it was recorded. Waits for the device.
  void finish();

 private:
  struct Late {
    Interval interval;
    Mark begin, end;
    Pending pending;  // its span, where there is one
  };
  static bool known(const Late& late) { return late.pending ? late.pending.done() : late.end.reached(); }
  void add(Late late);
  void tell(Late& late) const;

  int rank_;
  DeviceTrace* trace_;
  std::vector<std::shared_ptr<Observer>> observers_;
  std::vector<Late> late_;
};

}  // namespace dualpipe
