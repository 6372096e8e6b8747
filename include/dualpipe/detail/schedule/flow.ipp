#pragma once

#include "dualpipe/detail/schedule/flow.hpp"

#include <algorithm>
#include <cstddef>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/simulator.hpp"
#include "dualpipe/schedule/op.hpp"

namespace dualpipe::detail {

Flow flow(const Schedule& schedule, const Costs& costs, Publish publish) {
  Simulator simulator(costs, publish);
  simulator.load_or_throw(schedule);
  Flow flow;
  flow.begin.resize(schedule.ranks.size());
  flow.duration.resize(schedule.ranks.size());
  for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    flow.begin[rank].reserve(schedule.ranks[rank].size());
    flow.duration[rank].reserve(schedule.ranks[rank].size());
  }
  for (std::size_t i = 0; i < simulator.nodes().size(); ++i) {
    const Simulator::Node& node = simulator.nodes()[i];
    const double begin = simulator.begins()[i];
    flow.begin[node.rank].push_back(begin);
    flow.duration[node.rank].push_back(node.duration);
    const Step& step = schedule.ranks[node.rank][node.at];
    for (const int k : {0, 1}) {
      if (node.to[k] < 0 || node.to[k] == node.rank) continue;
      const Op& op = k == 0 ? step.op : *step.overlapped;
      const StageResult result = *output_of(op, schedule.num_stages);
      flow.edges.push_back({.transfer = {result.payload, op.stage, op.micro_batch, node.rank, node.to[k]},
                            .producer = node.at,
                            .consumer = simulator.step_of(result.gradient(), result.receiver(), op.micro_batch),
                            .ready = begin + node.ready[k],
                            .send = node.send[k]});
    }
  }
  // Each edge was added after those that it depends on, and ready times never fall along such a chain. So a stable sort
  // keeps this order of dependencies, also where costs of zero make times equal.
  std::stable_sort(flow.edges.begin(), flow.edges.end(),
                   [](const TimedEdge& a, const TimedEdge& b) { return a.ready < b.ready; });
  return flow;
}

}  // namespace dualpipe::detail
