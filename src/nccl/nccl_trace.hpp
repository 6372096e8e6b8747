#pragma once

#include <memory>
#include <string>
#include <utility>

#include "dualpipe/comm/device_trace.hpp"
#include "dualpipe/detail/comm/operation_times.hpp"
#include "nccl/context.hpp"

namespace dualpipe::detail {

/// Moments are pooled events; ranges go to the device's profiler interface.
class NcclTrace final : public DeviceTrace, public OperationTimes {
 public:
  explicit NcclTrace(std::shared_ptr<NcclContext> context) : context_(std::move(context)) {}

  std::shared_ptr<const Moment> mark() override {
    return std::make_shared<Event>(context_,
                                   context_->record(context_->device().current_stream(), moment(), /*timed=*/true));
  }
  void push_range(const std::string& name) override { context_->device().push_range(name); }
  void pop_range() override { context_->device().pop_range(); }
  void time_operations(bool on) override { context_->time_operations(on); }
  void share_times(Communicator& ranks) override { context_->share_times(ranks); }

 private:
  /// Names a moment in errors.
  static Request moment() {
    Header header;
    header.channel = Channel::collective;
    header.operation = "moment of the device";
    return Request::collective(header);
  }

  class Event final : public Moment {
   public:
    Event(std::shared_ptr<NcclContext> context, EventPtr event)
        : context_(std::move(context)), event_(std::move(event)) {}
    bool reached() const override {
      return context_->on_device(moment(), [this](DeviceApi& device) { return device.done(event_.get()); });
    }
    double seconds() const override {
      return context_->on_device(moment(), [this](DeviceApi& device) { return device.time_of(event_.get()); });
    }

   private:
    std::shared_ptr<NcclContext> context_;
    EventPtr event_;
  };

  std::shared_ptr<NcclContext> context_;
};

}  // namespace dualpipe::detail
