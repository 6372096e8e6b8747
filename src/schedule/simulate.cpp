#include "dualpipe/schedule/simulate.hpp"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/detail/schedule/simulator.hpp"
#include "dualpipe/error.hpp"
#include "planner/flow.hpp"

namespace dualpipe {
std::string to_string(const Transfer& transfer) {
  const Pass pass = transfer.payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
  return detail::str(to_string(Op{pass, transfer.stage, transfer.micro_batch}), " from rank ", transfer.from,
                     " to rank ", transfer.to);
}

detail::Flow detail::flow(const Schedule& schedule, const Costs& costs, Publish publish) {
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
      const bool gradient = op.pass != Pass::Forward;
      flow.edges.push_back(
          {.transfer = {gradient ? Payload::gradient : Payload::activation, op.stage, op.micro_batch, node.rank,
                        node.to[k]},
           .producer = node.at,
           .consumer = simulator.step_of(gradient, gradient ? op.stage - 1 : op.stage + 1, op.micro_batch),
           .ready = begin + node.ready[k],
           .send = node.send[k]});
    }
  }
  // Edges were entered in an order in which each comes after those that it depends on, and ready times never fall along
  // such a chain. A stable sort therefore keeps that property even where costs of zero make times equal.
  std::stable_sort(flow.edges.begin(), flow.edges.end(),
                   [](const TimedEdge& a, const TimedEdge& b) { return a.ready < b.ready; });
  return flow;
}

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
    const Pass pass = transfer.payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
    const Step producer{{pass, transfer.stage, transfer.micro_batch}, std::nullopt};
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
