#pragma once

#include "dualpipe/schedule/generate.hpp"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

// One of the two streams of micro-batches that a rank works on: a direction of DualPipe, a chunk of a V. Forwards and
// backwards each take the stream's micro-batches in order.
class MicroBatchStream {
 public:
  MicroBatchStream(int stage, int first_micro_batch)
      : stage_(stage), forward_(first_micro_batch), input_(first_micro_batch), weight_(first_micro_batch) {}

  Op forward() { return {Pass::Forward, stage_, forward_++}; }
  Op backward() { return {Pass::Backward, stage_, input_++}; }
  Op backward_input() { return {Pass::BackwardInput, stage_, input_++}; }
  Op backward_weight() { return {Pass::BackwardWeight, stage_, weight_++}; }

 private:
  int stage_;
  int forward_;
  int input_;
  int weight_;
};

inline Schedule empty_schedule(const ScheduleSpec& spec, int num_stages) {
  Schedule schedule;
  schedule.name = spec.kind;
  schedule.num_stages = num_stages;
  schedule.num_micro_batches = spec.num_micro_batches;
  schedule.ranks.resize(static_cast<std::size_t>(spec.num_ranks));
  return schedule;
}

// The eight steps of DualPipe for one rank of a half of `half` ranks, at `place` in it (0 at the end of the pipeline),
// with `count` micro-batches in each of the two streams. `near` is the stream whose first stage is nearer.
inline std::vector<Step> dualpipe_steps(int half, int place, int count, MicroBatchStream near, MicroBatchStream far) {
  std::vector<Step> steps;
  std::deque<Op> queued;
  const auto single = [&](const Op& op) { steps.push_back({op, std::nullopt}); };
  const auto pair = [&](MicroBatchStream& f, MicroBatchStream& b) {
    const Op forward = f.forward();
    steps.push_back({forward, b.backward()});
  };
  const auto split = [&](MicroBatchStream& b) {
    const Op input = b.backward_input();
    single(input);
    queued.push_back({Pass::BackwardWeight, input.stage, input.micro_batch});
  };
  const auto weight = [&] {
    single(queued.front());
    queued.pop_front();
  };
  const int inner = half - place - 1;  // ranks between this one and the middle

  for (int i = 0; i < 2 * inner; ++i) single(near.forward());  // 1
  for (int i = 0; i <= place; ++i) {                           // 2
    single(near.forward());
    single(far.forward());
  }
  for (int i = 0; i < inner; ++i) {  // 3: the weight part at once, the activation is free for the next forward
    split(far);
    weight();
    single(far.forward());
  }
  for (int i = 0; i < count - 2 * half + place + 1; ++i) {  // 4: the main part
    if (i == 0 && inner == 0) {
      // The middle rank's backward is that of the forward before it, its neighbour needs it as early as possible.
      single(near.forward());
      single(far.backward());
    } else {
      pair(near, far);
    }
    pair(far, near);
  }
  for (int i = 0; i < inner; ++i) {  // 5
    single(far.backward());
    pair(far, near);
  }
  for (int i = 0; i < 2 * (place + 1);
       ++i) {  // 6: from the middle on, weight parts are kept to fill the gaps of 7 and 8
    MicroBatchStream& stream = i % 2 == 0 ? far : near;
    if (i <= place) {
      single(stream.backward());
    } else {
      split(stream);
    }
  }
  for (int i = 0; i < inner; ++i) {  // 7
    weight();
    split(near);
  }
  for (int i = 0; i <= place; ++i) weight();  // 8
  return steps;
}

inline Schedule dualpipe_schedule(const ScheduleSpec& spec) {
  const int P = spec.num_ranks;
  const int N = spec.num_micro_batches;
  DUALPIPE_CHECK(P % 2 == 0, "DualPipe needs an even number of ranks, got ", P, "; dualpipev takes odd numbers");
  DUALPIPE_CHECK(N % 2 == 0, "DualPipe needs an even number of micro-batches, half of them for each direction, got ", N,
                 "; dualpipev takes odd numbers");
  DUALPIPE_CHECK(N >= 2 * P - 2, "DualPipe on ", P, " ranks needs at least ", 2 * P - 2, " micro-batches, got ", N,
                 "; 1f1b and zb1p take any number");
  Schedule schedule = empty_schedule(spec, P);
  for (int r = 0; r < P; ++r) {
    const MicroBatchStream down(r, 0);            // enters at rank 0
    const MicroBatchStream up(P - 1 - r, N / 2);  // enters at rank P-1
    const bool upper = r < P / 2;
    schedule.ranks[static_cast<std::size_t>(r)] =
        dualpipe_steps(P / 2, std::min(r, P - 1 - r), N / 2, upper ? down : up, upper ? up : down);
  }
  return schedule;
}

inline Schedule dualpipev_schedule(const ScheduleSpec& spec) {
  const int P = spec.num_ranks;
  const int N = spec.num_micro_batches;
  DUALPIPE_CHECK(N >= 2 * P - 1, "dualpipev on ", P, " ranks needs at least ", 2 * P - 1, " micro-batches, got ", N,
                 "; zbv, 1f1b and zb1p take any number");
  Schedule schedule = empty_schedule(spec, 2 * P);
  for (int r = 0; r < P; ++r)
    schedule.ranks[static_cast<std::size_t>(r)] =
        dualpipe_steps(P, r, N, MicroBatchStream(r, 0), MicroBatchStream(2 * P - 1 - r, 0));
  return schedule;
}

inline Schedule gpipe_schedule(const ScheduleSpec& spec) {
  Schedule schedule = empty_schedule(spec, spec.num_ranks);
  for (int r = 0; r < spec.num_ranks; ++r) {
    MicroBatchStream stream(r, 0);
    auto& steps = schedule.ranks[static_cast<std::size_t>(r)];
    for (int m = 0; m < spec.num_micro_batches; ++m) steps.push_back({stream.forward(), std::nullopt});
    for (int m = 0; m < spec.num_micro_batches; ++m) steps.push_back({stream.backward(), std::nullopt});
  }
  return schedule;
}

inline Schedule one_f_one_b_schedule(const ScheduleSpec& spec) {
  Schedule schedule = empty_schedule(spec, spec.num_ranks);
  for (int r = 0; r < spec.num_ranks; ++r) {
    MicroBatchStream stream(r, 0);
    auto& steps = schedule.ranks[static_cast<std::size_t>(r)];
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

// ZB-H1: 1F1B with the backward split. Rank r keeps r weight parts back, so that inputs and weight parts together hold
// as much on every rank as 1F1B holds on rank 0, and works them off where 1F1B would idle at the end.
inline Schedule zb1p_schedule(const ScheduleSpec& spec) {
  const int N = spec.num_micro_batches;
  Schedule schedule = empty_schedule(spec, spec.num_ranks);
  for (int r = 0; r < spec.num_ranks; ++r) {
    MicroBatchStream stream(r, 0);
    auto& steps = schedule.ranks[static_cast<std::size_t>(r)];
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
// through chunk 0, then all through chunk 1, and so on. A group smaller than P would have to wait for itself at each
// turn from rank P-1 to rank 0, and the backwards of earlier groups behind it; so there are N / P groups (at least
// one), as equal as possible. Where P divides N this is the known order in groups of P.
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
    auto& steps = schedule.ranks[static_cast<std::size_t>(r)];
    const auto add = [&](Pass pass, const ChunkPass& turn) {
      steps.push_back({{pass, turn.chunk * P + r, turn.micro_batch}, std::nullopt});
    };
    const std::size_t warm_up = std::min(
        forwards.size(), static_cast<std::size_t>(std::int64_t{2} * (P - 1 - r) + std::int64_t{chunks - 1} * largest));
    for (std::size_t i = 0; i < warm_up; ++i) add(Pass::Forward, forwards[i]);
    for (std::size_t i = 0; i < backwards.size(); ++i) {
      if (warm_up + i < forwards.size()) add(Pass::Forward, forwards[warm_up + i]);
      add(Pass::Backward, backwards[i]);
    }
  }
  return schedule;
}

// ZBV: stage s on rank s on the way down, on rank 2P-1-s on the way up; backward always split. The order is made for N
// >= 2P-1; fewer micro-batches take it with the rest left out, which cannot deadlock, as micro-batches do not depend on
// each other.
inline Schedule zbv_schedule(const ScheduleSpec& spec) {
  const int P = spec.num_ranks;
  const int N = std::max(spec.num_micro_batches, 2 * P - 1);
  Schedule schedule = empty_schedule(spec, 2 * P);
  for (int r = 0; r < P; ++r) {
    MicroBatchStream down(r, 0), up(2 * P - 1 - r, 0);
    auto& steps = schedule.ranks[static_cast<std::size_t>(r)];
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
  static const std::vector<std::pair<std::string, ScheduleGenerator>> all = {{"dualpipe", dualpipe_schedule},
                                                                             {"dualpipev", dualpipev_schedule},
                                                                             {"1f1b", one_f_one_b_schedule},
                                                                             {"zb1p", zb1p_schedule},
                                                                             {"gpipe", gpipe_schedule},
                                                                             {"interleaved", interleaved_schedule},
                                                                             {"zbv", zbv_schedule}};
  return all;
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

Schedule make_schedule(const ScheduleSpec& spec) {
  const auto& all = detail::schedule_generators();
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& entry) { return entry.first == spec.kind; });
  if (found == all.end()) {
    std::string known;
    for (const std::string& kind : schedule_kinds()) known += (known.empty() ? "" : ", ") + kind;
    throw InvalidArgument(detail::str("unknown schedule kind \"", spec.kind, "\"; known are ", known));
  }
  DUALPIPE_CHECK(spec.num_ranks >= 1, spec.kind, ": the number of ranks must be at least 1, got ", spec.num_ranks);
  DUALPIPE_CHECK(spec.num_micro_batches >= 1, spec.kind, ": the number of micro-batches must be at least 1, got ",
                 spec.num_micro_batches);
  const bool chunked = spec.kind == "interleaved";
  DUALPIPE_CHECK(!chunked || spec.chunks_per_rank >= 2, "interleaved needs at least 2 chunks per rank, got ",
                 spec.chunks_per_rank, "; 1f1b has one");
  // Keeps every product below within int and a slip of the keyboard from filling the memory.
  constexpr double most_forwards = 1 << 26;
  const double chunks = chunked ? spec.chunks_per_rank : 2;
  const double forwards =
      chunks * spec.num_ranks * std::max(spec.num_micro_batches, 2 * std::min(spec.num_ranks, 1 << 26));
  DUALPIPE_CHECK(forwards <= most_forwards, spec.kind, " with ", spec.num_ranks, " ranks, ", spec.num_micro_batches,
                 " micro-batches and ", chunks, " chunks per rank would have about ", forwards,
                 " forwards; the most supported is ", most_forwards);
  return found->second(spec);
}

}  // namespace dualpipe
