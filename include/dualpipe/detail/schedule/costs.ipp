#pragma once

#include "dualpipe/schedule/costs.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

inline void check_cost(double cost, const std::string& what) {
  DUALPIPE_CHECK(std::isfinite(cost) && cost >= 0, "the cost of ", what, " must be finite and not negative, got ",
                 cost);
}

inline void check_stage_costs(const StageCosts& costs, const std::string& of) {
  check_cost(costs.forward, "forward" + of);
  check_cost(costs.backward, "backward" + of);
  check_cost(costs.weight, "weight" + of);
  DUALPIPE_CHECK(costs.weight <= costs.backward, "the weight part is a part of the backward, but it costs ",
                 costs.weight, " and the backward only ", costs.backward, of);
  // Their sum is used as a cost too and must be finite.
  check_cost(costs.forward + costs.backward, "forward and backward together" + of);
}

inline void check_cost_index(int index, int count, const char* what, const std::string& where) {
  DUALPIPE_CHECK(index >= 0 && index < count, where, ": ", what, " ", index, ", but the schedule has ", count,
                 " of them");
}

}  // namespace dualpipe::detail

namespace dualpipe {

void check(const Costs& costs, int num_ranks, int num_stages) {
  detail::check_stage_costs({costs.forward, costs.backward, costs.weight}, "");
  detail::check_cost(costs.pair, "pair");
  detail::check_cost(costs.send, "send");
  DUALPIPE_CHECK(costs.weight <= costs.pair, "the weight part is a part of a pair, but it costs ", costs.weight,
                 " and the pair only ", costs.pair);
  for (const double fraction : {costs.ready.activation, costs.ready.gradient})
    DUALPIPE_CHECK(fraction < 0 || (fraction > 0 && fraction <= 1),
                   "a pair's result is ready at a fraction of it above 0 and up to 1, or negative for before its weight"
                   " part; got ",
                   fraction);
  DUALPIPE_CHECK(costs.stages.empty() || std::ssize(costs.stages) == num_stages, "costs of ", costs.stages.size(),
                 " stages, but the schedule has ", num_stages);
  for (std::size_t stage = 0; stage < costs.stages.size(); ++stage)
    detail::check_stage_costs(costs.stages[stage], detail::str(" of stage ", stage));
  for (const PairCost& pair : costs.pairs) {
    const std::string what = detail::str("a pair of stages ", pair.forward, " (forward) and ", pair.backward);
    detail::check_cost_index(pair.forward, num_stages, "stage", what);
    detail::check_cost_index(pair.backward, num_stages, "stage", what);
    detail::check_cost(pair.duration, what);
  }
  for (const SendCost& send : costs.sends) {
    std::string what = "a transfer";
    if (send.boundary != SendCost::any) {
      what += detail::str(" over boundary ", send.boundary);
      detail::check_cost_index(send.boundary, num_stages - 1, "boundary", what);
    }
    if (send.rank_a != SendCost::any || send.rank_b != SendCost::any) {
      what += detail::str(" between the ranks ", send.rank_a, " and ", send.rank_b);
      detail::check_cost_index(send.rank_a, num_ranks, "rank", what);
      detail::check_cost_index(send.rank_b, num_ranks, "rank", what);
      DUALPIPE_CHECK(send.rank_a != send.rank_b, what, ": nothing is sent within a rank");
    }
    detail::check_cost(send.duration, what);
  }
  DUALPIPE_CHECK(std::ssize(costs.slowdown) <= num_ranks, "costs: a slowdown of rank ", costs.slowdown.size() - 1,
                 ", but there are ", num_ranks, " ranks");
  for (std::size_t rank = 0; rank < costs.slowdown.size(); ++rank)
    DUALPIPE_CHECK(std::isfinite(costs.slowdown[rank]) && costs.slowdown[rank] > 0, "the slowdown of rank ", rank,
                   " must be a positive factor, got ", costs.slowdown[rank]);
  DUALPIPE_CHECK(std::isfinite(costs.seconds_per_unit) && costs.seconds_per_unit >= 0,
                 "seconds_per_unit must be finite and not negative, got ", costs.seconds_per_unit);
}

}  // namespace dualpipe
