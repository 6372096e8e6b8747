#include "planner/search/problem.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

SearchProblem::SearchProblem(int ranks_count, int stages_count, int micro_batches_count, const std::vector<int>& ranks,
                             const planner::CostModel& model, const planner::SearchOptions& options)
    : num_ranks(ranks_count),
      num_stages(stages_count),
      num_micro_batches(micro_batches_count),
      publish(options.publish),
      route_of(micro_batches_count),
      costs(model.time),
      table(model.time, options.publish, ranks_count, stages_count),
      memory(model.memory.stages),
      stages_of(ranks_count),
      limits(options.limits) {
  check(model.memory, num_stages);
  memory.resize(num_stages, {model.memory.activation, model.memory.weight, model.memory.state});
  std::map<std::vector<int>, std::size_t> known;
  for (int m = 0; m < num_micro_batches; ++m) {
    std::vector<int> route(num_stages);
    for (int s = 0; s < num_stages; ++s) {
      route[s] = ranks[std::int64_t{s} * num_micro_batches + m];
      DUALPIPE_CHECK(route[s] >= 0, "no rank runs stage ", s, " of micro-batch ", m);
    }
    const auto [entry, is_new] = known.try_emplace(route, routes.size());
    if (is_new) routes.push_back({route, {}});
    route_of[m] = static_cast<int>(entry->second);
    routes[entry->second].micro_batches.push_back(m);
  }
  for (const PipelineRoute& route : routes)
    for (int s = 0; s < num_stages; ++s) stages_of[route.ranks[s]].push_back(s);
  for (auto& stages : stages_of) {
    std::sort(stages.begin(), stages.end());
    stages.erase(std::unique(stages.begin(), stages.end()), stages.end());
  }
}

double SearchProblem::state_of(int rank) const {
  double state = 0;
  for (const int stage : stages_of[rank]) state += memory[stage].state;
  return state;
}

Numbering::Numbering(const SearchProblem& problem)
    : problem_(problem), lines_(problem.routes.size() * problem.num_stages) {}

std::int64_t Numbering::line(const Op& op) const {
  return std::int64_t{problem_.route_of[op.micro_batch]} * problem_.num_stages + op.stage;
}

bool Numbering::operator()(std::vector<Step>& steps, int rank) {
  for (std::size_t route = 0; route < problem_.routes.size(); ++route)
    for (const int stage : problem_.stages_of[rank]) {
      Line& here = lines_[route * problem_.num_stages + stage];
      here.forwards = here.backwards = here.weights = 0;
      here.waiting.clear();
    }
  int activations = 0, weights = 0;
  constexpr double rounding = 1e-9;
  double held = problem_.state_of(rank);
  const double most = problem_.limits.memory * (1 + rounding);

  for (Step& step : steps) {
    // In a pair the forward is begun before the backward has ended, but the backward needs a forward of before.
    Op* const back = step.overlapped ? &*step.overlapped : step.op.pass == Pass::Forward ? nullptr : &step.op;
    if (back != nullptr && back->pass != Pass::BackwardWeight) {
      Line& here = lines_[line(*back)];
      if (here.backwards == here.forwards) return false;
      back->micro_batch = problem_.routes[problem_.route_of[back->micro_batch]].micro_batches[here.backwards++];
      if (back->pass == Pass::BackwardInput) here.waiting.push_back(back->micro_batch);
    }
    if (step.op.pass == Pass::Forward) {
      Line& here = lines_[line(step.op)];
      step.op.micro_batch = problem_.routes[problem_.route_of[step.op.micro_batch]].micro_batches[here.forwards++];
      ++activations;
      held += problem_.memory[step.op.stage].activation;
      if (activations > problem_.limits.activations || held > most) return false;
    }
    if (back == nullptr) continue;
    const planner::StageMemory& memory = problem_.memory[back->stage];
    if (back->pass == Pass::BackwardWeight) {
      Line& here = lines_[line(*back)];
      if (here.weights == std::ssize(here.waiting)) return false;
      back->micro_batch = here.waiting[here.weights++];
      --weights;
      held -= memory.weight;
      continue;
    }
    --activations;
    held -= memory.activation;
    if (back->pass == Pass::Backward) continue;
    ++weights;
    held += memory.weight;
    if (weights > problem_.limits.weights || held > most) return false;
  }
  return true;
}

}  // namespace dualpipe::detail
