#pragma once

#include "dualpipe/schedule/simulate.hpp"

#include <cstddef>
#include <optional>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/flow.hpp"
#include "dualpipe/detail/schedule/simulator.hpp"

namespace dualpipe {

Simulation simulate(const Schedule& schedule, const Costs& costs, Publish publish) {
  const detail::Flow flow = detail::flow(schedule, costs, publish);
  Simulation result;
  result.timeline.name = schedule.name;
  result.timeline.num_ranks = static_cast<int>(schedule.ranks.size());
  result.timeline.seconds_per_unit = costs.seconds_per_unit;
  auto& intervals = result.timeline.intervals;
  for (int rank = 0; rank < result.timeline.num_ranks; ++rank)
    for (std::size_t at = 0; at < schedule.ranks[rank].size(); ++at) {
      const double begin = flow.begin[rank][at];
      intervals.push_back({rank, Lane::compute, schedule.ranks[rank][at], begin, begin + flow.duration[rank][at]});
    }
  result.transfers.reserve(flow.edges.size());
  for (const detail::TimedEdge& edge : flow.edges) {
    const Transfer& transfer = edge.transfer;
    const double arrival = edge.ready + edge.send;
    result.transfers.push_back({transfer, edge.ready, arrival});
    if (edge.send == 0) continue;  // nothing to see
    const Step producer{{detail::producer_of(transfer.payload), transfer.stage, transfer.micro_batch}, std::nullopt};
    intervals.push_back({transfer.from, Lane::send, producer, edge.ready, arrival});
    intervals.push_back({transfer.to, Lane::receive, producer, edge.ready, arrival});
  }
  return result;
}

double simulate_makespan(const Schedule& schedule, const Costs& costs, Publish publish) {
  detail::Simulator simulator(costs, publish);
  return simulator.load_or_throw(schedule);
}

}  // namespace dualpipe
