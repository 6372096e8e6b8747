#include "dualpipe/planner/memory.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::planner {
namespace {

void check_memory(double amount, const char* what, const std::string& of) {
  DUALPIPE_CHECK(std::isfinite(amount) && amount >= 0, "the memory of ", what, of,
                 " must be finite and not negative, got ", amount);
}

void check_stage(const StageMemory& costs, const std::string& of) {
  check_memory(costs.activation, "an activation", of);
  check_memory(costs.weight, "a waiting weight part", of);
  check_memory(costs.state, "parameters and optimizer", of);
}

/// What one rank holds as its steps go by.
class Holder {
 public:
  /// @param stages  of which a rank holds, each with the state that a rank has.
  Holder(const std::vector<StageMemory>& stages, const std::optional<double>& kept)
      : stages_(stages), kept_(kept), held_(stages.size(), false) {}

  void run(const Step& step) {
    detail::visit_ops(step, [&](const Op& op) { begin(op); });
    detail::visit_ops(step, [&](const Op& op) { end(op); });
  }

  RankMemory result() const {
    RankMemory result = result_;
    result.peak = result.state + peak_;
    return result;
  }

 private:
  void begin(const Op& op) {
    DUALPIPE_CHECK(op.stage >= 0 && op.stage < static_cast<int>(stages_.size()), to_string(op), ": the schedule has ",
                   stages_.size(), " stages");
    if (!held_[op.stage]) result_.state += stages_[op.stage].state;
    held_[op.stage] = true;
    if (detail::is_backward(op.pass)) add(freed_between(op));
    if (op.pass != Pass::Forward) return;
    add(stages_[op.stage].activation);
    result_.peak_activations = std::max(result_.peak_activations, ++activations_);
  }

  void end(const Op& op) {
    const StageMemory& costs = stages_[op.stage];
    if (op.pass == Pass::Forward) now_ -= freed_between(op);
    if (detail::is_backward(op.pass)) {
      now_ -= costs.activation;
      --activations_;
    }
    if (op.pass == Pass::BackwardInput) {
      add(costs.weight);
      result_.peak_weights = std::max(result_.peak_weights, ++weights_);
    }
    if (op.pass == Pass::BackwardWeight) {
      now_ -= costs.weight;
      --weights_;
    }
  }

  /// Of an activation, from its forward to its backward.
  double freed_between(const Op& op) const { return kept_ ? stages_[op.stage].activation - *kept_ : 0; }

  void add(double amount) {
    now_ += amount;
    peak_ = std::max(peak_, now_);
  }

  const std::vector<StageMemory>& stages_;
  const std::optional<double>& kept_;
  std::vector<bool> held_;
  RankMemory result_;
  double now_ = 0, peak_ = 0;
  int activations_ = 0, weights_ = 0;
};

}  // namespace

void check(const MemoryCosts& costs, int num_stages) {
  check_stage({costs.activation, costs.weight, costs.state}, "");
  DUALPIPE_CHECK(costs.sharded >= 0 && costs.sharded <= 1,
                 "the share of the state that is sharded must be 0 to 1, got ", costs.sharded);
  DUALPIPE_CHECK(costs.replicas >= 1, "there is at least one replica, got ", costs.replicas);
  DUALPIPE_CHECK(costs.stages.empty() || std::ssize(costs.stages) == num_stages, "memory of ", costs.stages.size(),
                 " stages, but the schedule has ", num_stages);
  for (std::size_t stage = 0; stage < costs.stages.size(); ++stage)
    check_stage(costs.stages[stage], detail::str(" of stage ", stage));
  if (!costs.kept) return;
  check_memory(*costs.kept, "what stays of an activation", "");
  const auto check_kept = [&](double activation, const std::string& of) {
    DUALPIPE_CHECK(*costs.kept <= activation, *costs.kept, " cannot stay of an activation", of, ", which takes ",
                   activation);
  };
  if (costs.stages.empty()) check_kept(costs.activation, "");
  for (std::size_t stage = 0; stage < costs.stages.size(); ++stage)
    check_kept(costs.stages[stage].activation, detail::str(" of stage ", stage));
}

std::vector<RankMemory> memory(const Schedule& schedule, const MemoryCosts& costs) {
  check(costs, schedule.num_stages);
  std::vector<StageMemory> stages = costs.stages;
  stages.resize(std::max(0, schedule.num_stages), {costs.activation, costs.weight, costs.state});
  if (costs.sharded > 0) {
    const std::vector<std::vector<int>> held = holders(schedule);
    for (std::size_t stage = 0; stage < held.size(); ++stage) {
      const double copies = static_cast<double>(held[stage].size()) * costs.replicas;
      stages[stage].state *= copies > 0 ? 1 - costs.sharded + costs.sharded / copies : 1;
    }
  }
  std::vector<RankMemory> result;
  result.reserve(schedule.ranks.size());
  for (const auto& steps : schedule.ranks) {
    Holder holder(stages, costs.kept);
    for (const Step& step : steps) holder.run(step);
    result.push_back(holder.result());
  }
  return result;
}

}  // namespace dualpipe::planner
