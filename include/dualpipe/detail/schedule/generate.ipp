#pragma once

#include "dualpipe/schedule/generate.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/eight_steps.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {

inline Schedule empty_schedule(const ScheduleSpec& spec, int num_stages) {
  Schedule schedule;
  schedule.name = spec.kind;
  schedule.num_stages = num_stages;
  schedule.num_micro_batches = spec.num_micro_batches;
  schedule.ranks.resize(spec.num_ranks);
  return schedule;
}

inline Schedule eight_step_schedule(const ScheduleSpec& spec) {
  const auto numbered = eight_steps(spec);
  Schedule schedule = empty_schedule(spec, spec.kind == "dualpipev" ? 2 * spec.num_ranks : spec.num_ranks);
  for (std::size_t rank = 0; rank < numbered.size(); ++rank)
    for (const NumberedStep& step : numbered[rank]) schedule.ranks[rank].push_back(step.step);
  return schedule;
}

inline Schedule gpipe_schedule(const ScheduleSpec& spec) {
  Schedule schedule = empty_schedule(spec, spec.num_ranks);
  for (int r = 0; r < spec.num_ranks; ++r) {
    MicroBatchStream stream(r, 0);
    auto& steps = schedule.ranks[r];
    for (int m = 0; m < spec.num_micro_batches; ++m) steps.push_back({stream.forward(), std::nullopt});
    for (int m = 0; m < spec.num_micro_batches; ++m) steps.push_back({stream.backward(), std::nullopt});
  }
  return schedule;
}

inline Schedule one_f_one_b_schedule(const ScheduleSpec& spec) {
  Schedule schedule = empty_schedule(spec, spec.num_ranks);
  for (int r = 0; r < spec.num_ranks; ++r) {
    MicroBatchStream stream(r, 0);
    auto& steps = schedule.ranks[r];
    const int warm_up = std::min(spec.num_micro_batches, spec.num_ranks - 1 - r);
    for (int m = 0; m < warm_up; ++m) steps.push_back({stream.forward(), std::nullopt});
    for (int m = warm_up; m < spec.num_micro_batches; ++m) {
      steps.push_back({stream.forward(), std::nullopt});
      steps.push_back({stream.backward(), std::nullopt});
    }
    for (int m = 0; m < warm_up; ++m) steps.push_back({stream.backward(), std::nullopt});
  }
  return schedule;
}

// ZB-H1: 1F1B with a split backward. Rank r delays r weight parts and runs them at the end, where 1F1B would idle. Each
// rank then holds as much as rank 0 does in 1F1B.
inline Schedule zb1p_schedule(const ScheduleSpec& spec) {
  const int N = spec.num_micro_batches;
  Schedule schedule = empty_schedule(spec, spec.num_ranks);
  for (int r = 0; r < spec.num_ranks; ++r) {
    MicroBatchStream stream(r, 0);
    auto& steps = schedule.ranks[r];
    const int warm_up = std::min(N, spec.num_ranks - 1 - r);
    for (int m = 0; m < warm_up; ++m) steps.push_back({stream.forward(), std::nullopt});
    for (int m = 0; m < N; ++m) {
      if (m < N - warm_up) steps.push_back({stream.forward(), std::nullopt});
      steps.push_back({stream.backward_input(), std::nullopt});
      if (m >= r) steps.push_back({stream.backward_weight(), std::nullopt});
    }
    for (int m = 0; m < std::min(N, r); ++m) steps.push_back({stream.backward_weight(), std::nullopt});
  }
  return schedule;
}

// One pass of one chunk over one micro-batch, in the order that all ranks share.
struct ChunkPass {
  int chunk = 0;
  int micro_batch = 0;
};

// 1F1B over chunks_per_rank chunks, stage c * P + r on rank r. Micro-batches go through in groups: all of a group
// through chunk 0, then all through chunk 1, and so on. A group smaller than P would wait for itself at each step from
// rank P-1 to rank 0, and would delay the backwards of earlier groups. So there are N / P groups, at least one, of
// nearly equal size. If P divides N, this is the known order in groups of P.
inline Schedule interleaved_schedule(const ScheduleSpec& spec) {
  const int P = spec.num_ranks;
  const int N = spec.num_micro_batches;
  const int chunks = spec.chunks_per_rank;
  const int groups = std::max(1, N / P);
  const int largest = (N + groups - 1) / groups;
  std::vector<ChunkPass> forwards, backwards;
  for (int g = 0, begin = 0; g < groups; ++g) {
    const int end = begin + N / groups + (g < N % groups ? 1 : 0);
    for (int c = 0; c < chunks; ++c) {
      for (int m = begin; m < end; ++m) {
        forwards.push_back({c, m});
        backwards.push_back({chunks - 1 - c, m});
      }
    }
    begin = end;
  }
  Schedule schedule = empty_schedule(spec, chunks * P);
  for (int r = 0; r < P; ++r) {
    auto& steps = schedule.ranks[r];
    const auto add = [&](Pass pass, const ChunkPass& turn) {
      steps.push_back({{pass, turn.chunk * P + r, turn.micro_batch}, std::nullopt});
    };
    const auto count = std::ssize(forwards);
    const std::int64_t warm_up =
        std::min<std::int64_t>(count, std::int64_t{2} * (P - 1 - r) + std::int64_t{chunks - 1} * largest);
    for (std::int64_t i = 0; i < warm_up; ++i) add(Pass::Forward, forwards[i]);
    for (std::int64_t i = 0; i < count; ++i) {
      if (warm_up + i < count) add(Pass::Forward, forwards[warm_up + i]);
      add(Pass::Backward, backwards[i]);
    }
  }
  return schedule;
}

// ZBV: stage s on rank s on the way down, on rank 2P-1-s on the way up; backward always split. The order exists for N
// >= 2P-1. With fewer micro-batches the ops of the missing ones are left out, which cannot deadlock, since
// micro-batches do not depend on each other.
inline Schedule zbv_schedule(const ScheduleSpec& spec) {
  const int P = spec.num_ranks;
  const int N = std::max(spec.num_micro_batches, 2 * P - 1);
  Schedule schedule = empty_schedule(spec, 2 * P);
  for (int r = 0; r < P; ++r) {
    MicroBatchStream down(r, 0), up(2 * P - 1 - r, 0);
    auto& steps = schedule.ranks[r];
    const auto add = [&](const Op& op) {
      if (op.micro_batch < spec.num_micro_batches) steps.push_back({op, std::nullopt});
    };
    const auto whole = [&](MicroBatchStream& stream) {
      add(stream.backward_input());
      add(stream.backward_weight());
    };
    // Warm-up: the way down is filled until its first micro-batch is back on the way up.
    for (int i = 0; i < 2 * (P - r) - 1; ++i) add(down.forward());
    for (int i = 0; i < r; ++i) {
      add(up.forward());
      add(down.forward());
    }
    for (int i = 0; i < P - r; ++i) {
      add(up.forward());
      whole(up);
    }
    // Forwards so far: down 2P-1-r, up P. From here on each turn is a forward and a backward of both.
    for (int i = P; i < N; ++i) {
      if (i + P - 1 - r < N) add(down.forward());
      whole(down);
      add(up.forward());
      whole(up);
    }
    // Cool-down: r inputs are open on the way up, P on the way down; weight parts fill the gaps.
    for (int i = 0; i < r; ++i) {
      add(down.backward_input());
      add(up.backward_input());
    }
    for (int i = 0; i < P - r; ++i) whole(down);
    for (int i = 0; i < r; ++i) add(up.backward_weight());
    for (int i = 0; i < r; ++i) add(down.backward_weight());
  }
  return schedule;
}

using ScheduleGenerator = Schedule (*)(const ScheduleSpec&);
inline const std::vector<std::pair<std::string, ScheduleGenerator>>& schedule_generators() {
  static const std::vector<std::pair<std::string, ScheduleGenerator>> all = {{"dualpipe", eight_step_schedule},
                                                                             {"dualpipev", eight_step_schedule},
                                                                             {"1f1b", one_f_one_b_schedule},
                                                                             {"zb1p", zb1p_schedule},
                                                                             {"gpipe", gpipe_schedule},
                                                                             {"interleaved", interleaved_schedule},
                                                                             {"zbv", zbv_schedule}};
  return all;
}

std::string joined_schedule_kinds() {
  std::string text;
  for (const std::string& kind : schedule_kinds()) text += (text.empty() ? "" : ", ") + kind;
  return text;
}

}  // namespace dualpipe::detail

namespace dualpipe {

const std::vector<std::string>& schedule_kinds() {
  static const std::vector<std::string> kinds = [] {
    std::vector<std::string> names;
    for (const auto& [name, generator] : detail::schedule_generators()) names.push_back(name);
    return names;
  }();
  return kinds;
}

bool is_schedule_kind(const std::string& name) {
  const auto& kinds = schedule_kinds();
  return std::find(kinds.begin(), kinds.end(), name) != kinds.end();
}

Schedule make_schedule(const ScheduleSpec& spec) {
  const auto& all = detail::schedule_generators();
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& entry) { return entry.first == spec.kind; });
  DUALPIPE_CHECK(found != all.end(), "unknown schedule kind \"", spec.kind, "\"; known are ",
                 detail::joined_schedule_kinds());
  DUALPIPE_CHECK(spec.num_ranks >= 1, spec.kind, ": the number of ranks must be at least 1, got ", spec.num_ranks);
  DUALPIPE_CHECK(spec.num_micro_batches >= 1, spec.kind, ": the number of micro-batches must be at least 1, got ",
                 spec.num_micro_batches);
  const bool chunked = spec.kind == "interleaved";
  DUALPIPE_CHECK(!chunked || spec.chunks_per_rank >= 2, "interleaved needs at least 2 chunks per rank, got ",
                 spec.chunks_per_rank, "; 1f1b has one");
  // Keeps the products within int, and a mistyped number from filling the memory.
  constexpr double most_forwards = 1 << 26;
  const double chunks = chunked ? spec.chunks_per_rank : 2;
  const double forwards =
      chunks * spec.num_ranks * std::max(spec.num_micro_batches, 2 * std::min(spec.num_ranks, 1 << 26));
  DUALPIPE_CHECK(forwards <= most_forwards, spec.kind, " with ", spec.num_ranks, " ranks, ", spec.num_micro_batches,
                 " micro-batches and ", chunks, " chunks per rank would have about ", forwards,
                 " forwards; the most supported is ", most_forwards);
  return found->second(spec);
}

int supported_micro_batches(const ScheduleSpec& spec) {
  const int N = spec.num_micro_batches;
  if (spec.kind == "dualpipe") return std::max(N + N % 2, 2 * spec.num_ranks - 2);
  if (spec.kind == "dualpipev") return std::max(N, 2 * spec.num_ranks - 1);
  return N;
}

}  // namespace dualpipe
