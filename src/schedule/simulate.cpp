#include "dualpipe/schedule/simulate.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "schedule/flow.hpp"

namespace dualpipe {

std::string to_string(const Transfer& transfer) {
  const Pass pass = transfer.payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
  return detail::str(to_string(Op{pass, transfer.stage, transfer.micro_batch}), " from rank ", transfer.from,
                     " to rank ", transfer.to);
}

namespace detail {
namespace {

constexpr int nowhere = -1;

bool is_backward(Pass pass) { return pass == Pass::Backward || pass == Pass::BackwardInput; }

void check_costs(const Costs& costs) {
  const std::array<std::pair<const char*, double>, 5> all{{{"forward", costs.forward},
                                                           {"backward", costs.backward},
                                                           {"weight", costs.weight},
                                                           {"pair", costs.pair},
                                                           {"send", costs.send}}};
  for (const auto& [name, cost] : all)
    DUALPIPE_CHECK(std::isfinite(cost) && cost >= 0, "the cost of ", name, " must be finite and not negative, got ",
                   cost);
  DUALPIPE_CHECK(costs.weight <= costs.backward, "the weight part is a part of the backward, but it costs ",
                 costs.weight, " and the backward only ", costs.backward);
  DUALPIPE_CHECK(costs.weight <= costs.pair, "the weight part is a part of a pair, but it costs ", costs.weight,
                 " and the pair only ", costs.pair);
  for (const double fraction : {costs.ready.activation, costs.ready.gradient})
    DUALPIPE_CHECK(fraction < 0 || (fraction > 0 && fraction <= 1),
                   "a pair's result is ready at a fraction of it above 0 and up to 1, or negative for before its weight"
                   " part; got ",
                   fraction);
}

/// Where each op of a schedule is. Tables have one entry per (stage, micro-batch).
class Places {
 public:
  explicit Places(const Schedule& schedule) : schedule_(schedule) {
    std::int64_t forwards = 0;
    for (const auto& steps : schedule.ranks)
      for (const Step& step : steps) forwards += step.op.pass == Pass::Forward;
    DUALPIPE_CHECK(schedule.num_stages >= 1 && schedule.num_micro_batches >= 1,
                   "a schedule needs at least one stage and one micro-batch, got ", schedule.num_stages, " and ",
                   schedule.num_micro_batches);
    // Compared before anything is allocated: a mistyped number of billions must be an error, not an exhausted memory.
    const std::int64_t cells = std::int64_t{schedule.num_stages} * schedule.num_micro_batches;
    DUALPIPE_CHECK(forwards == cells, "the schedule has ", forwards, " forwards, but ", schedule.num_stages,
                   " stages with ", schedule.num_micro_batches, " micro-batches each need ", cells);
    rank_.assign(static_cast<std::size_t>(cells), nowhere);
    forward_.assign(static_cast<std::size_t>(cells), nowhere);
    backward_.assign(static_cast<std::size_t>(cells), nowhere);
    for (int rank = 0; rank < static_cast<int>(schedule.ranks.size()); ++rank)
      for (int at = 0; at < static_cast<int>(schedule.ranks[rank].size()); ++at) enter(rank, at);
  }

  std::size_t cell(int stage, int micro_batch) const {
    return static_cast<std::size_t>(stage) * schedule_.num_micro_batches + micro_batch;
  }
  int rank(int stage, int micro_batch) const { return rank_[cell(stage, micro_batch)]; }
  int forward(int stage, int micro_batch) const { return forward_[cell(stage, micro_batch)]; }
  int backward(int stage, int micro_batch) const { return backward_[cell(stage, micro_batch)]; }
  std::size_t size() const { return rank_.size(); }

 private:
  void enter(int rank, int at) {
    const Step& step = schedule_.ranks[rank][at];
    if (step.overlapped)
      DUALPIPE_CHECK(step.op.pass == Pass::Forward && is_backward(step.overlapped->pass), "rank ", rank, ", step ", at,
                     ": a pair is a forward and a backward, got ", to_string(step));
    enter(rank, at, step.op);
    if (step.overlapped) enter(rank, at, *step.overlapped);
  }

  void enter(int rank, int at, const Op& op) {
    const auto where = [&] { return str("rank ", rank, ", step ", at, " (", to_string(op), ")"); };
    DUALPIPE_CHECK(op.stage >= 0 && op.stage < schedule_.num_stages && op.micro_batch >= 0 &&
                       op.micro_batch < schedule_.num_micro_batches,
                   where(), ": the schedule has ", schedule_.num_stages, " stages and ", schedule_.num_micro_batches,
                   " micro-batches");
    const std::size_t here = cell(op.stage, op.micro_batch);
    if (op.pass == Pass::Forward) {
      DUALPIPE_CHECK(forward_[here] == nowhere, where(), ": rank ", rank_[here], " runs this forward too");
      rank_[here] = rank;
      forward_[here] = at;
      return;
    }
    DUALPIPE_CHECK(rank_[here] == rank && forward_[here] < at, where(), ": its forward is not before it on this rank");
    if (op.pass == Pass::BackwardWeight) {
      DUALPIPE_CHECK(backward_[here] != nowhere && backward_[here] < at, where(),
                     ": its backward for the input is not before it on this rank");
      return;
    }
    DUALPIPE_CHECK(backward_[here] == nowhere, where(), ": this micro-batch has a backward at step ", backward_[here],
                   " already");
    backward_[here] = at;
  }

  const Schedule& schedule_;
  std::vector<int> rank_, forward_, backward_;
};

/// The run itself: every rank goes as far as it can; publishing a result wakes the rank that stopped for it.
class Run {
 public:
  Run(const Schedule& schedule, const Costs& costs, Publish publish)
      : schedule_(schedule), costs_(costs), publish_(publish), places_(schedule) {
    const std::size_t num_ranks = schedule.ranks.size();
    next_.assign(num_ranks, 0);
    free_at_.assign(num_ranks, 0);
    missing_.assign(num_ranks, std::nullopt);
    flow_.begin.resize(num_ranks);
    for (std::size_t rank = 0; rank < num_ranks; ++rank) flow_.begin[rank].reserve(schedule.ranks[rank].size());
    for (auto& times : available_) times.assign(places_.size(), absent);
  }

  Flow operator()() && {
    for (int rank = static_cast<int>(schedule_.ranks.size()); rank-- > 0;) runnable_.push_back(rank);
    while (!runnable_.empty()) {
      const int rank = runnable_.back();
      runnable_.pop_back();
      while (next_[rank] < static_cast<int>(schedule_.ranks[rank].size()) && advance(rank)) {
      }
    }
    check_finished();
    // Edges were entered in an order in which each comes after those that it depends on, and ready times never fall
    // along such a chain. A stable sort therefore keeps that property even where costs of zero make times equal.
    std::stable_sort(flow_.edges.begin(), flow_.edges.end(),
                     [](const TimedEdge& a, const TimedEdge& b) { return a.ready < b.ready; });
    return std::move(flow_);
  }

 private:
  /// What a step needs or makes: the output of a forward or the input gradient of a backward.
  struct Result {
    Payload payload;
    int stage;
    int micro_batch;
    bool operator==(const Result&) const = default;
  };

  std::optional<Result> input_of(const Op& op) const {
    if (op.pass == Pass::Forward && op.stage > 0) return Result{Payload::activation, op.stage - 1, op.micro_batch};
    if (is_backward(op.pass) && op.stage + 1 < schedule_.num_stages)
      return Result{Payload::gradient, op.stage + 1, op.micro_batch};
    return std::nullopt;
  }

  double& available(const Result& result) {
    return available_[result.payload == Payload::gradient][places_.cell(result.stage, result.micro_batch)];
  }

  /// Runs the next step of `rank`; false if an input is missing.
  bool advance(int rank) {
    const Step& step = schedule_.ranks[rank][next_[rank]];
    double begin = free_at_[rank];
    for (const Op* op : {&step.op, step.overlapped ? &*step.overlapped : nullptr}) {
      if (op == nullptr) continue;
      if (const auto input = input_of(*op)) {
        const double time = available(*input);
        if (time == absent) {
          missing_[rank] = input;
          return false;
        }
        begin = std::max(begin, time);
      }
    }
    const double end = begin + duration(step, costs_);
    double ready = end;
    if (publish_ == Publish::early && step.overlapped && step.overlapped->pass == Pass::Backward)
      ready = begin + (costs_.pair - costs_.weight);
    else if (publish_ == Publish::early && step.op.pass == Pass::Backward)
      ready = begin + (costs_.backward - costs_.weight);
    const auto ready_at = [&](double fraction) {
      const bool own = publish_ == Publish::early && step.overlapped && fraction > 0;
      return own ? begin + fraction * (end - begin) : ready;
    };
    publish_result(rank, step.op, ready_at(costs_.ready.activation), end);
    if (step.overlapped) publish_result(rank, *step.overlapped, ready_at(costs_.ready.gradient), end);
    flow_.begin[rank].push_back(begin);
    free_at_[rank] = end;
    ++next_[rank];
    return true;
  }

  void publish_result(int rank, const Op& op, double ready, double end) {
    const bool forward = op.pass == Pass::Forward;
    const int to_stage = forward ? op.stage + 1 : op.stage - 1;
    if (op.pass == Pass::BackwardWeight || to_stage < 0 || to_stage == schedule_.num_stages) return;
    const int to = places_.rank(to_stage, op.micro_batch);
    const int consumer =
        forward ? places_.forward(to_stage, op.micro_batch) : places_.backward(to_stage, op.micro_batch);
    if (consumer == nowhere) return;
    const Result result{forward ? Payload::activation : Payload::gradient, op.stage, op.micro_batch};
    available(result) = to == rank ? end : ready + costs_.send;
    if (to == rank) return;
    flow_.edges.push_back({{result.payload, op.stage, op.micro_batch, rank, to}, next_[rank], consumer, ready});
    if (missing_[to] == result) {
      missing_[to].reset();
      runnable_.push_back(to);
    }
  }

  void check_finished() const {
    std::string stuck;
    for (int rank = 0; rank < static_cast<int>(schedule_.ranks.size()); ++rank) {
      if (!missing_[rank]) continue;
      const Result& result = *missing_[rank];
      const Pass pass = result.payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
      stuck += str("\n  rank ", rank, " at step ", next_[rank], ", ", to_string(schedule_.ranks[rank][next_[rank]]),
                   ", waits for the result of ", to_string(Op{pass, result.stage, result.micro_batch}), " from rank ",
                   places_.rank(result.stage, result.micro_batch));
    }
    DUALPIPE_CHECK(stuck.empty(), "the schedule '", schedule_.name, "' cannot run to its end:", stuck);
  }

  static constexpr double absent = -1;

  const Schedule& schedule_;
  const Costs& costs_;
  const Publish publish_;
  const Places places_;
  std::vector<int> next_;                         // per rank: index of its next step
  std::vector<double> free_at_;                   // per rank: end of its last step
  std::vector<std::optional<Result>> missing_;    // per rank: what it stopped for
  std::array<std::vector<double>, 2> available_;  // activations, gradients: when the consumer has them
  std::vector<int> runnable_;
  Flow flow_;
};

}  // namespace

double duration(const Step& step, const Costs& costs) {
  if (step.overlapped) return step.overlapped->pass == Pass::BackwardInput ? costs.pair - costs.weight : costs.pair;
  switch (step.op.pass) {
    case Pass::Forward:
      return costs.forward;
    case Pass::BackwardInput:
      return costs.backward - costs.weight;
    case Pass::BackwardWeight:
      return costs.weight;
    case Pass::Backward:
      break;
  }
  return costs.backward;
}

Flow flow(const Schedule& schedule, const Costs& costs, Publish publish) {
  check_costs(costs);
  return Run{schedule, costs, publish}();
}

}  // namespace detail

Simulation simulate(const Schedule& schedule, const Costs& costs, Publish publish) {
  const detail::Flow flow = detail::flow(schedule, costs, publish);
  Simulation result;
  result.timeline.name = schedule.name;
  result.timeline.num_ranks = static_cast<int>(schedule.ranks.size());
  auto& intervals = result.timeline.intervals;
  for (int rank = 0; rank < result.timeline.num_ranks; ++rank)
    for (std::size_t at = 0; at < schedule.ranks[rank].size(); ++at) {
      const Step& step = schedule.ranks[rank][at];
      const double begin = flow.begin[rank][at];
      intervals.push_back({rank, Lane::compute, step, begin, begin + detail::duration(step, costs)});
    }
  result.transfers.reserve(flow.edges.size());
  for (const detail::TimedEdge& edge : flow.edges) {
    const Transfer& transfer = edge.transfer;
    const double arrival = edge.ready + costs.send;
    result.transfers.push_back({transfer, edge.ready, arrival});
    if (costs.send == 0) continue;  // nothing to see
    const Pass pass = transfer.payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
    const Step producer{{pass, transfer.stage, transfer.micro_batch}, std::nullopt};
    intervals.push_back({transfer.from, Lane::send, producer, edge.ready, arrival});
    intervals.push_back({transfer.to, Lane::receive, producer, edge.ready, arrival});
  }
  return result;
}

}  // namespace dualpipe
