#pragma once

#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/costs.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/transfer.hpp"

namespace dualpipe::detail {

/// A boundary transfer between two ranks, with the two steps that it connects.
struct TimedEdge {
  Transfer transfer;
  int producer = 0;  ///< index of the step of rank `transfer.from` that computes it
  int consumer = 0;  ///< index of the step of rank `transfer.to` that needs it
  double ready = 0;  ///< published by its producer
  double send = 0;   ///< until it arrives
};

/// When each step begins and each transfer is ready: simulate draws it, lower makes programs of it.
struct Flow {
  std::vector<std::vector<double>> begin;     ///< begin[r][k]: step k of rank r
  std::vector<std::vector<double>> duration;  ///< of the same
  std::vector<TimedEdge> edges;  ///< by ready time; at equal times an edge comes after those that it depends on
};

/// Linear in the number of ops but for the sort of the edges. @throws InvalidArgument  as simulate does.
DUALPIPE_DECL Flow flow(const Schedule& schedule, const Costs& costs, Publish publish);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/flow.ipp"
#endif
