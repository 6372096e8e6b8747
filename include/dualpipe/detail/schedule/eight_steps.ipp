#pragma once

#include "dualpipe/detail/schedule/eight_steps.hpp"

#include <algorithm>
#include <deque>
#include <optional>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

/// Writes the eight steps of one rank. In the comments 0 is the stream whose first stage is nearer, 1 the other one.
class EightSteps {
 public:
  EightSteps(MicroBatchStream near, MicroBatchStream far) : near_(near), far_(far) {}

  /// @param half   ranks from an end of the pipeline to where the schedule turns.
  /// @param place  of this rank among them, 0 at the end of the pipeline.
  /// @param count  micro-batches of each stream.
  std::vector<NumberedStep> operator()(int half, int place, int count) && {
    const int outer = place + 1, inner = half - outer;
    const bool middle = inner == 0;

    repeat(1, 2 * inner, [&](int) { F(near_); });
    repeat(2, outer, [&](int) { F(near_), F(far_); });
    repeat(3, inner, [&](int) { I(far_), W(), F(far_); });
    repeat(4, count - 2 * half + outer,
           [&](int i) { i == 0 && middle ? F_then_B() : FB(near_, far_), FB(far_, near_); });
    repeat(5, inner, [&](int) { B(far_), FB(far_, near_); });
    repeat(6, outer, [&](int i) { B_or_I(far_, 2 * i < outer), B_or_I(near_, 2 * i + 1 < outer); });
    repeat(7, inner, [&](int) { W(), I(near_); });
    repeat(8, outer, [&](int) { W(); });
    return std::move(steps_);
  }

 private:
  template <class Body>
  void repeat(int number, int times, const Body& body) {
    number_ = number;
    for (repetition_ = 0; repetition_ < times; ++repetition_) body(repetition_);
  }

  void F(MicroBatchStream& stream) { add({stream.forward(), std::nullopt}); }
  void B(MicroBatchStream& stream) { add({stream.backward(), std::nullopt}); }
  /// The weight part waits for its turn: at once in step 3, where the next forward needs the memory; later it fills the
  /// gaps of the steps 7 and 8.
  void I(MicroBatchStream& stream) {
    const Op input = stream.backward_input();
    add({input, std::nullopt});
    weights_.push_back({Pass::BackwardWeight, input.stage, input.micro_batch});
  }
  void W() {
    add({weights_.front(), std::nullopt});
    weights_.pop_front();
  }
  void B_or_I(MicroBatchStream& stream, bool whole) { whole ? B(stream) : I(stream); }
  void FB(MicroBatchStream& forward, MicroBatchStream& backward) {
    const Op op = forward.forward();
    add({op, backward.backward()});
  }
  /// The first pair of the middle rank runs as two ops: the backward is that of the forward before it, and the
  /// neighbour waits for its gradient.
  void F_then_B() { F(near_), B(far_); }

  void add(const Step& step) { steps_.push_back({step, number_, repetition_}); }

  MicroBatchStream near_, far_;
  std::deque<Op> weights_;
  std::vector<NumberedStep> steps_;
  int number_ = 0, repetition_ = 0;
};

inline std::vector<std::vector<NumberedStep>> eight_steps_of_v(const ScheduleSpec& spec) {
  const int P = spec.num_ranks, N = spec.num_micro_batches;
  DUALPIPE_CHECK(N >= 2 * P - 1, "dualpipev on ", P, " ranks needs at least ", 2 * P - 1, " micro-batches, got ", N,
                 "; zbv, 1f1b and zb1p take any number");
  std::vector<std::vector<NumberedStep>> ranks;
  for (int r = 0; r < P; ++r)
    ranks.push_back(EightSteps(MicroBatchStream(r, 0), MicroBatchStream(2 * P - 1 - r, 0))(P, r, N));
  return ranks;
}

std::vector<std::vector<NumberedStep>> eight_steps(const ScheduleSpec& spec) {
  if (spec.kind == "dualpipev") return eight_steps_of_v(spec);
  const int P = spec.num_ranks, N = spec.num_micro_batches;
  DUALPIPE_CHECK(P % 2 == 0, "DualPipe needs an even number of ranks, got ", P, "; dualpipev takes odd numbers");
  DUALPIPE_CHECK(N % 2 == 0, "DualPipe needs an even number of micro-batches, half of them for each direction, got ", N,
                 "; dualpipev takes odd numbers");
  DUALPIPE_CHECK(N >= 2 * P - 2, "DualPipe on ", P, " ranks needs at least ", 2 * P - 2, " micro-batches, got ", N,
                 "; 1f1b and zb1p take any number");
  std::vector<std::vector<NumberedStep>> ranks;
  for (int r = 0; r < P; ++r) {
    const MicroBatchStream down(r, 0);            // enters at rank 0
    const MicroBatchStream up(P - 1 - r, N / 2);  // enters at rank P-1
    const bool upper = r < P / 2;
    ranks.push_back(EightSteps(upper ? down : up, upper ? up : down)(P / 2, std::min(r, P - 1 - r), N / 2));
  }
  return ranks;
}

}  // namespace dualpipe::detail
