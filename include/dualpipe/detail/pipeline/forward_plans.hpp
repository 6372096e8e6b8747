#pragma once

#include <cstddef>
#include <list>
#include <memory>

#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe::detail {

/// The forward-only plans of a training schedule, by number of micro-batches. The most recently used are kept.
class ForwardPlans {
 public:
  ForwardPlans(Schedule training, Publish publish) : training_(std::move(training)), publish_(publish) {}

  std::shared_ptr<const Plan> of(int num_micro_batches) {
    for (auto entry = recent_.begin(); entry != recent_.end(); ++entry) {
      if ((*entry)->schedule.num_micro_batches != num_micro_batches) continue;
      recent_.splice(recent_.begin(), recent_, entry);
      return recent_.front();
    }
    recent_.push_front(std::make_shared<const Plan>(make_plan(forward_only(training_, num_micro_batches), publish_)));
    if (recent_.size() > max_plans) recent_.pop_back();
    return recent_.front();
  }

 private:
  static constexpr std::size_t max_plans = 8;

  Schedule training_;
  Publish publish_;
  std::list<std::shared_ptr<const Plan>> recent_;
};

}  // namespace dualpipe::detail
