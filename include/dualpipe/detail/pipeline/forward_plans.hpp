#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <utility>

#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe::detail {

/// The forward-only plans of a training schedule, by number of micro-batches. The most recently used are kept.
class ForwardPlans {
 public:
  /// @param communicator  outlives this.
  ForwardPlans(Communicator& communicator, std::shared_ptr<const Plan> training)
      : communicator_(communicator), training_(std::move(training)) {}

  std::shared_ptr<const Plan> of(int num_micro_batches) {
    for (auto entry = recent_.begin(); entry != recent_.end(); ++entry) {
      if ((*entry)->schedule.num_micro_batches != num_micro_batches) continue;
      recent_.splice(recent_.begin(), recent_, entry);
      return recent_.front();
    }
    recent_.push_front(plan_of_rank(communicator_, str("forward ", num_micro_batches, " of ", training_->key), [&] {
      return make_plan(forward_only(training_->schedule, num_micro_batches), training_->publish);
    }));
    if (recent_.size() > max_plans) recent_.pop_back();
    return recent_.front();
  }

 private:
  static constexpr std::size_t max_plans = 8;

  Communicator& communicator_;
  std::shared_ptr<const Plan> training_;
  std::list<std::shared_ptr<const Plan>> recent_;
};

}  // namespace dualpipe::detail
