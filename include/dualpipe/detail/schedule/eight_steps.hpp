#pragma once

#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/op.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/schedule_spec.hpp"

namespace dualpipe::detail {

/// The micro-batches that one rank runs on one of its stages: a direction of DualPipe, a chunk of a V. Forwards and
/// backwards take them in order.
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

/// A step of DualPipe or DualPipeV, and which of the eight steps of the published order it belongs to.
struct NumberedStep {
  Step step;
  int number = 0;      ///< 1 to 8
  int repetition = 0;  ///< from 0
};

/// What each rank does, in order. Kind "dualpipe" or "dualpipev", at least one rank.
///
/// @throws InvalidArgument  numbers of ranks or micro-batches that the order does not exist for.
DUALPIPE_DECL std::vector<std::vector<NumberedStep>> eight_steps(const ScheduleSpec& spec);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/schedule/eight_steps.ipp"
#endif
