#pragma once

#include <memory>
#include <string>
#include <utility>

#include "dualpipe/comm/device_trace.hpp"
#include "nccl/family.hpp"

namespace dualpipe::detail {

/// Times by pooled events, ranges by the device's own profiler interface.
class NcclTrace final : public DeviceTrace {
 public:
  explicit NcclTrace(std::shared_ptr<NcclFamily> family) : family_(std::move(family)) {}

  std::shared_ptr<const Moment> mark() override {
    return std::make_shared<Event>(family_,
                                   family_->record(family_->device().current_stream(), moment(), /*timed=*/true));
  }
  void push_range(const std::string& name) override { family_->device().push_range(name); }
  void pop_range() override { family_->device().pop_range(); }

 private:
  /// Names it in errors.
  static Request moment() {
    Header header;
    header.channel = Channel::collective;
    header.operation = "moment of the device";
    return Request::collective(header);
  }

  class Event final : public Moment {
   public:
    Event(std::shared_ptr<NcclFamily> family, EventPtr event) : family_(std::move(family)), event_(std::move(event)) {}
    bool reached() const override {
      return family_->on_device(moment(), [this](DeviceApi& device) { return device.done(event_.get()); });
    }
    double seconds() const override {
      return family_->on_device(moment(), [this](DeviceApi& device) { return device.time_of(event_.get()); });
    }

   private:
    std::shared_ptr<NcclFamily> family_;
    EventPtr event_;
  };

  std::shared_ptr<NcclFamily> family_;
};

}  // namespace dualpipe::detail
