#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <utility>

#include "dualpipe/config.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"
#include "dualpipe/detail/pipeline/training_plan.hpp"

namespace dualpipe::detail {

/// The plans of a pipeline, by number of micro-batches: that of the options, and the most recently used of others.
class Plans {
 public:
  /// @param communicator  outlives this.
  Plans(Communicator& communicator, DualPipeOptions options, std::shared_ptr<const Plan> training, int num_replicas,
        bool communicates)
      : communicator_(communicator),
        options_(std::move(options)),
        training_(std::move(training)),
        num_replicas_(num_replicas),
        communicates_(communicates) {}

  /// @throws InvalidArgument  there is no order for so many, on all ranks.
  std::shared_ptr<const Plan> training(int num_micro_batches) {
    if (num_micro_batches == training_->schedule.num_micro_batches) return training_;
    return recent(trainings_, num_micro_batches, [&] {
      return resized_plan(*training_, options_, num_micro_batches, communicator_, num_replicas_, communicates_);
    });
  }
  std::shared_ptr<const Plan> forward(int num_micro_batches) {
    return recent(forwards_, num_micro_batches, [&] {
      return plan_of_rank(communicator_, str("forward ", num_micro_batches, " of ", training_->key), [&] {
        return make_plan(forward_only(training_->schedule, num_micro_batches), training_->publish);
      });
    });
  }

 private:
  using Recent = std::list<std::shared_ptr<const Plan>>;
  static constexpr std::size_t max_plans = 8;  // of each list

  template <class Make>
  static std::shared_ptr<const Plan> recent(Recent& plans, int num_micro_batches, const Make& make) {
    for (auto entry = plans.begin(); entry != plans.end(); ++entry) {
      if ((*entry)->schedule.num_micro_batches != num_micro_batches) continue;
      plans.splice(plans.begin(), plans, entry);
      return plans.front();
    }
    plans.push_front(make());
    if (plans.size() > max_plans) plans.pop_back();
    return plans.front();
  }

  Communicator& communicator_;
  DualPipeOptions options_;
  std::shared_ptr<const Plan> training_;
  int num_replicas_;
  bool communicates_;
  Recent trainings_, forwards_;
};

}  // namespace dualpipe::detail
