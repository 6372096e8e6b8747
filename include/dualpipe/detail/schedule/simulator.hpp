#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/schedule/cost_table.hpp"
#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/transfer.hpp"

namespace dualpipe::detail {

/// A schedule flattened so that it is evaluated in one pass over an array: for jitter, where one order runs with many
/// durations, and for search, where many orders of the same work run with the same costs. Tables keep their memory from
/// one load to the next.
///
///     Simulator simulator(costs, Publish::early);
///     if (simulator.load(schedule)) best = std::min(best, simulator.makespan());
class Simulator {
 public:
  static constexpr int nothing = 0, nowhere = 1;  ///< slots: of a step without input; of a result that nobody needs
  static constexpr int no_step = -1;

  /// A step and what it needs and makes. Results lie in slots.
  struct Node {
    int rank = 0;
    int at = 0;  ///< index into ranks[rank] of the schedule
    double duration = 0;
    std::array<int, 2> input{};                   ///< slots of what its ops need
    std::array<int, 2> output{nowhere, nowhere};  ///< slots of the results of the op and of the overlapped op
    std::array<double, 2> ready{};                ///< when the results are published, from the step's begin
    std::array<double, 2> send{};                 ///< until they arrive; 0 on the same rank
    std::array<int, 2> to{-1, -1};                ///< the ranks that need them, -1: none
  };
  DUALPIPE_DECL Simulator(Costs costs, Publish publish);

  /// Loads a schedule; the next may have another size.
  ///
  /// @return  false if ranks wait for each other in a circle; `stuck` then says where. Nothing may be evaluated.
  /// @throws InvalidArgument  a schedule that is no such order at all (an op twice, a backward before its forward, an
  ///     op out of range), and costs that do not fit it.
  DUALPIPE_DECL bool load(const Schedule& schedule);

  /// Loads and evaluates.
  ///
  /// @return  the makespan.
  /// @throws InvalidArgument  also ranks that wait in a circle, and a makespan that is not finite.
  DUALPIPE_DECL double load_or_throw(const Schedule& schedule);

  /// "\n  rank 1 at step 1, 1F1, waits for the result of 0F1 from rank 0" for each rank.
  DUALPIPE_DECL std::string stuck(const Schedule& schedule) const;

  /// Begins at 0. Every duration counts as it is.
  double makespan() {
    return makespan([] { return 1.0; });
  }

  /// @param factor  called for each step and each transfer that takes time, in a fixed order; what it returns
  ///     multiplies the duration.
  template <class Factor>
  double makespan(Factor&& factor) {
    std::fill(free_at_.begin(), free_at_.end(), 0.0);
    double last = 0;
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      const Node& node = nodes_[i];
      double& free_at = free_at_[node.rank];
      const double begin = std::max(free_at, std::max(time_[node.input[0]], time_[node.input[1]]));
      const double scale = factor();
      begin_[i] = begin;
      free_at = begin + scale * node.duration;
      last = std::max(last, free_at);
      for (const int k : {0, 1})
        time_[node.output[k]] = begin + scale * node.ready[k] + (node.send[k] > 0 ? factor() * node.send[k] : 0.0);
    }
    return last;
  }

  /// In an order in which each comes after those that it depends on.
  const std::vector<Node>& nodes() const noexcept { return nodes_; }
  /// By node: when it began in the last evaluation.
  const std::vector<double>& begins() const noexcept { return begin_; }
  /// The step of its rank that runs a forward, or a B or I; -1 where none does.
  int step_of(bool backward, int stage, int micro_batch) const { return at_[backward][cell(stage, micro_batch)]; }

 private:
  std::int64_t cell(int stage, int micro_batch) const { return std::int64_t{stage} * num_micro_batches_ + micro_batch; }
  int slot(const StageResult& result) const {
    return static_cast<int>(2 + cell(result.stage, result.micro_batch) + (result.gradient() ? std::ssize(rank_) : 0));
  }
  DUALPIPE_DECL void reshape(const Schedule& schedule);
  DUALPIPE_DECL void enter(int rank, int at, const Op& op);
  DUALPIPE_DECL int input_slot(const Op& op) const;
  DUALPIPE_DECL void append(int rank, int at, const Step& step);
  DUALPIPE_DECL void publish(Node& node, int which, const Op& op, const StepTimes& times);

  Costs costs_;
  Publish publish_;
  std::size_t num_ranks_ = 0;
  int num_stages_ = 0, num_micro_batches_ = 0;
  std::optional<CostTable> table_;  // for this many ranks and stages
  // By (stage, micro-batch).
  std::vector<int> rank_;
  std::array<std::vector<int>, 2> at_;  // forward, backward: the step of its rank
  // The run.
  std::vector<Node> nodes_;
  std::vector<char> made_;           // by slot: its producer is in nodes_
  std::vector<int> next_, missing_;  // by rank: its next step; the slot that it waits for, or nothing
  std::vector<int> runnable_;
  std::vector<double> time_;  // by slot: when it is there
  std::vector<double> begin_, free_at_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/simulator.ipp"
#endif
