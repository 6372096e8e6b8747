#pragma once

#include "dualpipe/detail/schedule/deadlock.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <vector>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {

// A waiting rank waits for an op of another waiting rank, else that op would be done. Following these waits ends in a
// cycle.
inline std::optional<Deadlock> deadlock_of(const Schedule& schedule, const CellTable& cells,
                                           const std::vector<int>& next_cell,
                                           const std::vector<std::optional<StageResult>>& waits_for) {
  const auto waits = [](const std::optional<StageResult>& result) { return result.has_value(); };
  const auto awaited = [&](int rank) -> Op {
    const StageResult& result = *waits_for[rank];
    if (!result.gradient()) return result.op();
    return {cells(result.stage, result.micro_batch).gradient_pass(), result.stage, result.micro_batch};
  };
  const auto stuck = std::find_if(waits_for.begin(), waits_for.end(), waits);
  if (stuck == waits_for.end()) return std::nullopt;
  std::vector<char> seen(waits_for.size(), 0);
  int rank = static_cast<int>(stuck - waits_for.begin());
  while (!seen[rank]) {
    seen[rank] = 1;
    rank = cells(awaited(rank)).rank;
  }
  constexpr int max_shown = 16;
  const int first = rank;
  std::string cycle;
  int length = 0;
  do {
    const Op wanted = awaited(rank);
    const CellPlace place = cells(wanted);
    if (length < max_shown) {
      cycle +=
          str(length == 0 ? "" : ", which ", length == 0 ? str("rank ", rank, " ") : "", "waits at cell ",
              next_cell[rank] + 1, " (", to_string(schedule.ranks[rank][next_cell[rank]]), ") for ", to_string(wanted));
      cycle += place.rank == rank ? str(", its own cell ", place.cell + 1) : ", " + to_string(place);
    }
    ++length;
    rank = place.rank;
  } while (rank != first);
  if (length > max_shown) cycle += str(", and so on through ", length, " ranks");
  const auto others = std::count_if(waits_for.begin(), waits_for.end(), waits) - length;
  if (others > 0) cycle += str("; ", others, others == 1 ? " other rank waits" : " other ranks wait", " behind them");
  return Deadlock{{first, next_cell[first]}, cycle};
}

// Runs all ranks as far as they get. A rank that stops waits for one result; making it wakes the rank.
std::optional<Deadlock> find_deadlock(const Schedule& schedule, const CellTable& cells) {
  std::array<std::vector<char>, 2> made;  // activations and gradients, by stage and micro-batch
  for (auto& results : made) results.assign(cells.size(), 0);
  const auto is_made = [&](const StageResult& result) -> char& {
    return made[result.gradient()][cells.index(result.stage, result.micro_batch)];
  };
  std::vector<int> next_cell(schedule.ranks.size(), 0);
  std::vector<std::optional<StageResult>> waits_for(schedule.ranks.size());
  std::vector<int> runnable;
  for (int rank = static_cast<int>(schedule.ranks.size()); rank-- > 0;) runnable.push_back(rank);

  const auto missing_input = [&](const Op& op) {
    auto input = input_of(op, schedule.num_stages);
    if (input && is_made(*input)) input.reset();
    return input;  // the rest is on the same rank and in order
  };
  const auto finish = [&](const Op& op) {
    const auto output = output_of(op, schedule.num_stages);
    if (!output) return;
    is_made(*output) = 1;
    const int rank = cells(output->receiver(), output->micro_batch)[Pass::Forward].rank;
    if (waits_for[rank] != output) return;
    waits_for[rank].reset();
    runnable.push_back(rank);
  };
  while (!runnable.empty()) {
    const int rank = runnable.back();
    runnable.pop_back();
    const auto& steps = schedule.ranks[rank];
    for (int& cell = next_cell[rank]; cell < std::ssize(steps); ++cell) {
      const Step& step = steps[cell];
      auto missing = missing_input(step.op);
      if (!missing && step.overlapped) missing = missing_input(*step.overlapped);
      if (missing) {
        waits_for[rank] = missing;
        break;
      }
      visit_ops(step, finish);
    }
  }
  return deadlock_of(schedule, cells, next_cell, waits_for);
}

}  // namespace dualpipe::detail
