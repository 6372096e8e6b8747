#include "dualpipe/planner/cost_model.hpp"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"

namespace dualpipe::planner {
namespace {

StageCosts& operator+=(StageCosts& sum, const StageCosts& stage) {
  sum.forward += stage.forward;
  sum.backward += stage.backward;
  sum.weight += stage.weight;
  return sum;
}
StageCosts operator*(double share, const StageCosts& stage) {
  return {share * stage.forward, share * stage.backward, share * stage.weight};
}
StageSize& operator+=(StageSize& sum, const StageSize& stage) {
  sum.parameters += stage.parameters;
  sum.bytes += stage.bytes;
  return sum;
}
StageSize operator*(double share, const StageSize& stage) { return {share * stage.parameters, share * stage.bytes}; }
StageMemory& operator+=(StageMemory& sum, const StageMemory& stage) {
  sum.activation += stage.activation;
  sum.weight += stage.weight;
  sum.state += stage.state;
  return sum;
}
StageMemory operator*(double share, const StageMemory& stage) {
  return {share * stage.activation, share * stage.weight, share * stage.state};
}

/// New stage s is the stretch [s * from / to, (s + 1) * from / to) of the old ones.
template <class Stage>
std::vector<Stage> stretches(const std::vector<Stage>& old, int num_stages) {
  std::vector<Stage> result(old.empty() ? 0 : num_stages, 0.0 * Stage{});
  // Counted in parts of which an old stage has `num_stages` and a new one old.size(), so that nothing is rounded.
  const auto count = static_cast<long long>(old.size());
  for (long long stage = 0; stage < static_cast<long long>(result.size()); ++stage)
    for (long long at = stage * count; at < (stage + 1) * count;) {
      const long long whole = at / num_stages;
      const long long end = std::min((stage + 1) * count, (whole + 1) * num_stages);
      result[stage] += static_cast<double>(end - at) / num_stages * old[whole];
      at = end;
    }
  return result;
}

std::vector<SendCost> moved(const std::vector<SendCost>& sends, int described, int num_stages) {
  std::vector<SendCost> result;
  std::map<std::pair<int, int>, std::vector<double>> links;
  for (const SendCost& send : sends) {
    if (send.rank_a != SendCost::any) {
      links[std::minmax(send.rank_a, send.rank_b)].push_back(send.duration);
      continue;
    }
    if (send.boundary == SendCost::any) {
      result.push_back(send);
      continue;
    }
    // Boundary b lies (b + 1) / described into the model.
    const long long place = (send.boundary + 1LL) * num_stages;
    if (place % described != 0) continue;
    result.push_back(send);
    result.back().boundary = static_cast<int>(place / described) - 1;
  }
  for (const auto& [ranks, durations] : links) {
    double sum = 0;
    for (const double duration : durations) sum += duration;
    result.push_back(
        {.rank_a = ranks.first, .rank_b = ranks.second, .duration = sum / static_cast<double>(durations.size())});
  }
  return result;
}

}  // namespace

CostModel recomputed(CostModel model, double kept) {
  Costs& time = model.time;
  const auto forward_of = [&](int stage) {
    return stage < std::ssize(time.stages) ? time.stages[stage].forward : time.forward;
  };
  for (PairCost& pair : time.pairs) pair.duration += forward_of(pair.backward);
  for (StageCosts& stage : time.stages) stage.backward += stage.forward;
  time.backward += time.forward;
  time.pair += time.forward;
  model.memory.kept = kept;
  return model;
}

std::vector<double> parameters_of_ranks(const Schedule& schedule, const std::vector<StageSize>& sizes) {
  if (sizes.empty()) return {};
  DUALPIPE_CHECK(std::ssize(sizes) == schedule.num_stages, "sizes of ", sizes.size(), " stages, but the schedule has ",
                 schedule.num_stages);
  std::vector<double> result(schedule.ranks.size(), 0);
  const std::vector<std::vector<int>> held = holders(schedule);
  for (std::size_t stage = 0; stage < held.size(); ++stage)
    for (const int rank : held[stage]) result[rank] += sizes[stage].parameters;
  return result;
}

CostModel spread(const CostModel& model, int described, int num_stages) {
  DUALPIPE_CHECK(described >= 1 && num_stages >= 1, "costs of ", described, " stages cannot be spread over ",
                 num_stages);
  const auto check_length = [&](std::ptrdiff_t length) {
    DUALPIPE_CHECK(length == 0 || length == described, "costs of ", length, " stages, expected ", described);
  };
  check_length(std::ssize(model.time.stages));
  check_length(std::ssize(model.memory.stages));
  check_length(std::ssize(model.sizes));
  if (described == num_stages) return model;
  CostModel result = model;
  const double share = static_cast<double>(described) / num_stages;
  Costs& time = result.time;
  for (double* cost : {&time.forward, &time.backward, &time.weight, &time.pair}) *cost *= share;
  time.stages = stretches(time.stages, num_stages);
  time.pairs.clear();
  time.sends = moved(time.sends, described, num_stages);
  result.sizes = stretches(result.sizes, num_stages);
  MemoryCosts& memory = result.memory;
  for (double* amount : {&memory.activation, &memory.weight, &memory.state}) *amount *= share;
  memory.stages = stretches(memory.stages, num_stages);
  return result;
}

}  // namespace dualpipe::planner
