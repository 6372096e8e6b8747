#pragma once

#include "dualpipe/schedule/schedule.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe {

std::vector<int> placement(const Schedule& schedule) {
  const std::int64_t places = std::int64_t{schedule.num_stages} * schedule.num_micro_batches;
  const std::int64_t ops = detail::count_ops(schedule);
  DUALPIPE_CHECK(schedule.num_stages >= 0 && schedule.num_micro_batches >= 0 && places <= ops, "schedule \"",
                 schedule.name, "\" is incomplete: ", schedule.num_stages, " stages and ", schedule.num_micro_batches,
                 " micro-batches, but only ", ops, " ops");
  std::vector<int> ranks(places, -1);
  for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    detail::for_each_op(schedule.ranks[rank], [&](const Op& op) {
      DUALPIPE_CHECK(op.stage >= 0 && op.stage < schedule.num_stages && op.micro_batch >= 0 &&
                         op.micro_batch < schedule.num_micro_batches,
                     to_string(op), " on rank ", rank, " is not among ", schedule.num_stages, " stages and ",
                     schedule.num_micro_batches, " micro-batches");
      int& place = ranks[std::int64_t{op.stage} * schedule.num_micro_batches + op.micro_batch];
      if (place < 0) place = static_cast<int>(rank);
    });
  }
  return ranks;
}

int rank_of(const Schedule& schedule, int stage, int micro_batch) {
  for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    bool found = false;
    detail::for_each_op(schedule.ranks[rank],
                        [&](const Op& op) { found = found || (op.stage == stage && op.micro_batch == micro_batch); });
    if (found) return static_cast<int>(rank);
  }
  throw InvalidArgument(detail::str("no rank of schedule \"", schedule.name, "\" runs stage ", stage,
                                    " of micro-batch ", micro_batch, "; it has ", schedule.num_stages, " stages and ",
                                    schedule.num_micro_batches, " micro-batches"));
}

std::vector<int> holders(const Schedule& schedule, int stage) {
  std::vector<int> ranks;
  for (std::size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    bool held = false;
    detail::for_each_op(schedule.ranks[rank], [&](const Op& op) { held = held || op.stage == stage; });
    if (held) ranks.push_back(static_cast<int>(rank));
  }
  return ranks;
}

std::vector<std::vector<int>> holders(const Schedule& schedule) {
  std::vector<std::vector<int>> all(std::max(0, schedule.num_stages));
  for (int rank = 0; rank < std::ssize(schedule.ranks); ++rank)
    for (const int stage : stages_of(schedule, rank))
      if (stage >= 0 && stage < schedule.num_stages) all[stage].push_back(rank);
  return all;
}

std::vector<int> stages_of(const Schedule& schedule, int rank) {
  DUALPIPE_CHECK(rank >= 0 && rank < std::ssize(schedule.ranks), "rank ", rank, " is not among the ",
                 schedule.ranks.size(), " ranks of schedule \"", schedule.name, "\"");
  std::set<int> stages;
  detail::for_each_op(schedule.ranks[rank], [&](const Op& op) { stages.insert(op.stage); });
  return {stages.begin(), stages.end()};
}

std::string cells_around(const Schedule& schedule, int rank, int cell, int radius, const std::vector<int>& numbers) {
  const auto num_ranks = static_cast<int>(schedule.ranks.size());
  if (rank < 0 || rank >= num_ranks) return {};
  radius = std::clamp(radius, 0, 100);
  const auto row_of = [&](int r) -> const std::vector<Step>& { return schedule.ranks[r]; };
  const int first_rank = std::max(0, rank - radius);
  const int last_rank = std::min(num_ranks - 1, rank + radius);
  const int middle = std::clamp(cell, 0, std::max(0, static_cast<int>(row_of(rank).size()) - 1));
  const int first_cell = std::max(0, middle - radius);
  const int last_cell = middle + radius;

  std::vector<std::vector<std::string>> rows = {{""}};  // the head line, then a row per rank
  for (int c = first_cell; c <= last_cell; ++c) rows[0].push_back(std::to_string(c + 1));
  for (int r = first_rank; r <= last_rank; ++r) {
    auto& row = rows.emplace_back();
    row.push_back("rank " + std::to_string(numbers.empty() ? r : numbers[r]));
    for (int c = first_cell; c <= last_cell && c < static_cast<int>(row_of(r).size()); ++c) {
      const Step& step = row_of(r)[c];
      const std::string text =
          step.overlapped ? to_string(step.op) + "&" + to_string(*step.overlapped) : to_string(step.op);
      row.push_back(r == rank && c == cell ? "[" + text + "]" : " " + text);
    }
  }
  std::size_t width = 0;
  std::string text;
  for (const auto& row : rows)
    for (const auto& entry : row) width = std::max(width, entry.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::string line;
    for (const auto& entry : rows[i]) line += entry + std::string(width + 1 - entry.size(), ' ');
    if (static_cast<int>(i) == rank - first_rank + 1) line += "<-- here";
    text += line.substr(0, line.find_last_not_of(' ') + 1) + '\n';
  }
  return text;
}

Schedule forward_only(const Schedule& training, int num_micro_batches) {
  DUALPIPE_CHECK(num_micro_batches >= 1, "the number of micro-batches must be at least 1, got ", num_micro_batches);
  const std::vector<int> ranks = placement(training);
  Schedule schedule;
  schedule.name = training.name + " (forward only)";
  schedule.num_stages = training.num_stages;
  schedule.num_micro_batches = num_micro_batches;
  schedule.ranks.resize(training.ranks.size());

  // The slot of a forward is its stage plus its number among the micro-batches with the same route through the ranks.
  // It is larger than that of the stage before, so a rank that runs its forwards by slot cannot deadlock. Routes that
  // meet on a rank take turns.
  std::map<std::vector<int>, int> turns;
  std::vector<std::vector<std::pair<int, Op>>> slots(training.ranks.size());
  for (int m = 0; m < num_micro_batches; ++m) {
    const auto like = static_cast<int>(std::int64_t{m} * training.num_micro_batches / num_micro_batches);
    std::vector<int> route(training.num_stages);
    for (int s = 0; s < training.num_stages; ++s) {
      route[s] = ranks[std::int64_t{s} * training.num_micro_batches + like];
      DUALPIPE_CHECK(route[s] >= 0, "no rank of schedule \"", training.name, "\" runs stage ", s, " of micro-batch ",
                     like);
    }
    const int turn = turns[route]++;
    for (int s = 0; s < training.num_stages; ++s) slots[route[s]].emplace_back(turn + s, Op{Pass::Forward, s, m});
  }
  for (std::size_t rank = 0; rank < slots.size(); ++rank) {
    // Within a slot the later stage runs first: it is nearer to the end.
    std::sort(slots[rank].begin(), slots[rank].end(), [](const auto& a, const auto& b) {
      return std::tuple(a.first, -a.second.stage, a.second.micro_batch) <
             std::tuple(b.first, -b.second.stage, b.second.micro_batch);
    });
    for (const auto& slot : slots[rank]) schedule.ranks[rank].push_back({slot.second, std::nullopt});
  }
  return schedule;
}

Schedule with_fewer(const Schedule& schedule, int num_micro_batches) {
  const int N = schedule.num_micro_batches;
  DUALPIPE_CHECK(num_micro_batches >= 1 && num_micro_batches <= N, "the number of micro-batches must be 1 to ", N,
                 ", got ", num_micro_batches);
  std::vector<int> number(N, -1);  // -1: left out
  for (int m = 0; m < num_micro_batches; ++m) number[std::int64_t{m} * N / num_micro_batches] = m;
  Schedule fewer = schedule;
  fewer.num_micro_batches = num_micro_batches;
  for (auto& steps : fewer.ranks) {
    std::vector<Step> left;
    for (Step step : steps) {
      if (step.overlapped && number.at(step.overlapped->micro_batch) < 0) step.overlapped.reset();
      if (number.at(step.op.micro_batch) < 0) {
        if (!step.overlapped) continue;
        step = {*step.overlapped, std::nullopt};
      }
      step.op.micro_batch = number[step.op.micro_batch];
      if (step.overlapped) step.overlapped->micro_batch = number[step.overlapped->micro_batch];
      left.push_back(step);
    }
    steps = std::move(left);
  }
  return fewer;
}

}  // namespace dualpipe
