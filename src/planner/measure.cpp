#include "dualpipe/planner/cost_model.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"

namespace dualpipe::planner {
namespace {

/// The median of what was observed, where anything was.
class Observed {
 public:
  void add(double value) { values_.push_back(value); }
  bool empty() const { return values_.empty(); }
  std::optional<double> median() const {
    if (values_.empty()) return std::nullopt;
    std::vector<double> values = values_;
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    if (values.size() % 2 == 1) return *middle;
    return (*middle + *std::max_element(values.begin(), middle)) / 2;
  }

 private:
  std::vector<double> values_;
};

double length(const Interval& interval) { return interval.end - interval.begin; }

/// Where a rank is: a trace may be of several pipelines side by side, each with a copy of all stages.
struct PipelineRank {
  int rank = 0;      ///< within its pipeline
  int pipeline = 0;  ///< which of those that do the same
};

/// By rank of the trace. A forward runs on one rank of each pipeline, so ranks with the same first forward are the same
/// rank of different pipelines. Ranks without forwards are left out.
std::map<int, PipelineRank> pipeline_ranks(const Timeline& step) {
  using Forward = std::pair<int, int>;
  std::map<int, Forward> least;
  for (const Interval& interval : step.intervals) {
    const Op& op = interval.step.op;
    if (interval.lane != Lane::compute || op.pass != Pass::Forward) continue;
    const Forward forward{op.stage, op.micro_batch};
    const auto [known, added] = least.try_emplace(interval.rank, forward);
    if (!added) known->second = std::min(known->second, forward);
  }
  std::map<Forward, std::vector<int>> alike;
  std::map<int, PipelineRank> result;
  for (const auto& [rank, forward] : least) {
    const int next = static_cast<int>(alike.size());
    auto& same = alike[forward];
    const int own = same.empty() ? next : result[same.front()].rank;
    result[rank] = {own, static_cast<int>(same.size())};
    same.push_back(rank);
  }
  return result;
}

/// What travels is named by its pipeline and its producer: forward or not, stage, micro-batch.
using Result = std::tuple<int, bool, int, int>;
Result result_of(const PipelineRank& place, const Op& op) {
  return {place.pipeline, op.pass == Pass::Forward, op.stage, op.micro_batch};
}

/// "stages 0, 3 to 7"
std::string list(const std::vector<int>& stages) {
  std::string text = stages.size() == 1 ? "stage" : "stages";
  for (std::size_t i = 0; i < stages.size();) {
    std::size_t last = i;
    while (last + 1 < stages.size() && stages[last + 1] == stages[last] + 1) ++last;
    text += detail::str(i == 0 ? " " : ", ", stages[i]);
    if (last > i) text += detail::str(last > i + 1 ? " to " : ", ", stages[last]);
    i = last + 1;
  }
  return text;
}

class Measurement {
 public:
  void add_step(const Timeline& step) {
    const std::map<int, PipelineRank> all = pipeline_ranks(step);
    std::map<Result, const Interval*> pairs, sends;
    for (const Interval& interval : step.intervals) {
      if (interval.lane == Lane::compute) add_compute(interval);
      const auto place = all.find(interval.rank);
      if (place == all.end()) continue;
      if (interval.lane == Lane::send) sends[result_of(place->second, interval.step.op)] = &interval;
      if (interval.lane == Lane::compute && interval.step.overlapped)
        for (const Op& op : {interval.step.op, *interval.step.overlapped})
          pairs[result_of(place->second, op)] = &interval;
    }
    for (const auto& [result, send] : sends)
      if (const auto pair = pairs.find(result); pair != pairs.end()) in_pairs_.emplace_back(*pair->second, *send);
    for (const Interval& receive : step.intervals) {
      const auto place = all.find(receive.rank);
      if (receive.lane != Lane::receive || place == all.end()) continue;
      const auto send = sends.find(result_of(place->second, receive.step.op));
      if (send != sends.end()) add_transfer(*send->second, all.at(send->second->rank), receive, place->second);
    }
  }

  MeasuredCosts operator()() && {
    complete();
    Costs& costs = measured_.costs;
    const auto count = static_cast<double>(costs.stages.size());
    costs.forward = costs.backward = costs.weight = 0;
    for (const StageCosts& stage : costs.stages) {
      costs.forward += stage.forward / count;
      costs.backward += stage.backward / count;
      costs.weight += stage.weight / count;
    }
    add_pairs();
    for (const auto& [where, times] : transfers_) {
      const auto& [boundary, a, b] = where;
      if (boundary + 1 >= static_cast<int>(costs.stages.size())) continue;
      costs.sends.push_back({.boundary = boundary, .rank_a = a, .rank_b = b, .duration = *times.median()});
    }
    costs.send = all_transfers_.median().value_or(0);
    add_ready();
    return std::move(measured_);
  }

 private:
  struct Stage {
    Observed forward, backward, input, weight;
  };

  void add_compute(const Interval& interval) {
    const Step& step = interval.step;
    if (step.overlapped) {
      auto& [whole, without_weight] = pairs_[{step.op.stage, step.overlapped->stage}];
      (step.overlapped->pass == Pass::Backward ? whole : without_weight).add(length(interval));
      stages_[step.op.stage];
      stages_[step.overlapped->stage];
      return;
    }
    Stage& stage = stages_[step.op.stage];
    switch (step.op.pass) {
      case Pass::Forward:
        return stage.forward.add(length(interval));
      case Pass::Backward:
        return stage.backward.add(length(interval));
      case Pass::BackwardInput:
        return stage.input.add(length(interval));
      case Pass::BackwardWeight:
        return stage.weight.add(length(interval));
    }
  }

  void add_transfer(const Interval& send, const PipelineRank& from, const Interval& receive, const PipelineRank& to) {
    const Op& op = send.step.op;
    const int boundary = op.pass == Pass::Forward ? op.stage : op.stage - 1;
    if (boundary < 0 || from.rank == to.rank) return;  // goes nowhere
    const double duration = std::max(0.0, receive.end - std::max(send.begin, receive.begin));
    const auto [a, b] = std::minmax(from.rank, to.rank);
    transfers_[{boundary, a, b}].add(duration);
    all_transfers_.add(duration);
  }

  /// The durations of each stage, measured or taken from other stages.
  void complete() {
    DUALPIPE_CHECK(!stages_.empty(), "the trace has no steps");
    int expected = 0;
    for (const auto& [stage, observed] : stages_)
      DUALPIPE_CHECK(stage == expected++, "the trace has no steps of stage ", expected - 1);

    const auto forward = filled("forward", [](const Stage& stage) { return stage.forward.median(); });
    const auto backward = filled("backward", [](const Stage& stage) {
      const auto whole = stage.backward.median(), input = stage.input.median(), weight = stage.weight.median();
      return !whole && input && weight ? *input + *weight : whole;
    });
    std::vector<std::optional<double>> weight;
    double weights = 0, backwards = 0;  // of the stages that show both
    for (const auto& [index, stage] : stages_) {
      std::optional<double> part = stage.weight.median();
      if (const auto input = stage.input.median(); !part && input) part = backward[index] - *input;
      if (part) {
        part = std::clamp(*part, 0.0, backward[index]);
        weights += *part;
        backwards += backward[index];
      }
      weight.push_back(part);
    }
    const double share = backwards > 0 ? weights / backwards : 0.5;
    std::vector<int> unknown;
    for (std::size_t stage = 0; stage < stages_.size(); ++stage) {
      if (!weight[stage]) unknown.push_back(static_cast<int>(stage));
      measured_.costs.stages.push_back({forward[stage], backward[stage],
                                        std::min(backward[stage], weight[stage].value_or(share * backward[stage]))});
    }
    if (!unknown.empty())
      note(detail::str("weight part of ", list(unknown), ": none by itself in the trace, taken as ", share,
                       " of the backward", backwards > 0 ? ", as in the other stages" : ""));
  }

  /// What `of` finds for each stage, else the mean of the other stages.
  template <class Of>
  std::vector<double> filled(const char* what, const Of& of) {
    std::vector<std::optional<double>> found;
    std::vector<int> unknown;
    double sum = 0;
    for (const auto& [index, stage] : stages_) {
      found.push_back(of(stage));
      sum += found.back().value_or(0);
      if (!found.back()) unknown.push_back(index);
    }
    DUALPIPE_CHECK(unknown.size() < stages_.size(), "the trace has no ", what,
                   " outside of pairs, so what one costs is unknown: trace a training step");
    if (!unknown.empty())
      note(detail::str(what, " of ", list(unknown), ": only in pairs in the trace, taken as the mean of the others"));
    const double mean = sum / static_cast<double>(stages_.size() - unknown.size());
    std::vector<double> result;
    result.reserve(found.size());
    for (const auto& duration : found) result.push_back(duration.value_or(mean));
    return result;
  }

  void note(std::string text) { measured_.notes.push_back(std::move(text)); }

  void add_pairs() {
    Costs& costs = measured_.costs;
    double together = 0, apart = 0;
    for (const auto& [stages, observed] : pairs_) {
      const auto& [forward, backward] = stages;
      const double weight = costs.stages[backward].weight;
      const auto whole = observed.first.median(), without_weight = observed.second.median();
      const double duration = std::max(weight, whole ? *whole : *without_weight + weight);
      costs.pairs.push_back({forward, backward, duration});
      together += duration;
      apart += costs.stages[forward].forward + costs.stages[backward].backward;
    }
    costs.pair = std::max(costs.weight, (apart > 0 ? together / apart : 1) * (costs.forward + costs.backward));
    if (pairs_.empty()) note("pairs: none in the trace, taken as long as the forward and the backward together");
  }

  /// When results left their pairs, if that was not where the weight part begins.
  void add_ready() {
    constexpr double as_expected = 0.02;  // of the pair
    Observed at[2], off[2];
    for (const auto& [pair, send] : in_pairs_) {
      if (length(pair) <= 0) continue;
      const bool gradient = send.step.op.pass != Pass::Forward;
      const double fraction = (send.begin - pair.begin) / length(pair);
      const double weight = pair.step.overlapped->pass == Pass::Backward
                                ? measured_.costs.stages[pair.step.overlapped->stage].weight
                                : 0.0;
      at[gradient].add(fraction);
      off[gradient].add(std::abs(fraction - (1 - weight / length(pair))));
    }
    const auto ready = [&](int which) {
      if (at[which].empty() || *off[which].median() < as_expected) return PairReady{}.activation;
      return std::clamp(*at[which].median(), 0.001, 1.0);
    };
    measured_.costs.ready = {.activation = ready(0), .gradient = ready(1)};
  }

  std::map<int, Stage> stages_;
  std::map<std::pair<int, int>, std::pair<Observed, Observed>> pairs_;  // with a B, with an I
  std::map<std::tuple<int, int, int>, Observed> transfers_;             // boundary, ranks
  Observed all_transfers_;
  std::vector<std::pair<Interval, Interval>> in_pairs_;  // pair, send of one of its results
  MeasuredCosts measured_;
};

}  // namespace

MeasuredCosts measure_costs(const Timeline& trace) {
  const std::vector<Timeline> steps = split_steps(trace);
  Measurement measurement;
  for (std::size_t step = steps.size() > 1 ? 1 : 0; step < steps.size(); ++step) measurement.add_step(steps[step]);
  MeasuredCosts result = std::move(measurement)();
  result.costs.seconds_per_unit = trace.seconds_per_unit;
  if (trace.stages.size() == result.costs.stages.size())
    result.sizes = trace.stages;
  else if (!trace.stages.empty())
    result.notes.push_back(detail::str("the trace has sizes of ", trace.stages.size(), " stages and steps of ",
                                       result.costs.stages.size(), ": sizes are not taken"));
  return result;
}

}  // namespace dualpipe::planner
