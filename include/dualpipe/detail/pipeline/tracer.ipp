#pragma once

#include "dualpipe/pipeline/tracer.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/host.hpp"

namespace dualpipe {
namespace detail {

/// Intervals as tensors and a text, which travel between ranks.
struct PackedIntervals {
  /// Of each interval: rank, lane, op, whether it is a pair, overlapped op.
  static constexpr std::int64_t columns = 9;

  at::Tensor integers;  ///< [intervals, columns], int64
  at::Tensor times;     ///< [intervals, 2], float64: begin and end
  std::string nodes;    ///< names, each followed by a zero byte

  explicit PackedIntervals(const std::vector<Interval>& intervals) {
    const auto count = static_cast<std::int64_t>(intervals.size());
    integers = at::empty({count, columns}, at::kLong);
    times = at::empty({count, 2}, at::kDouble);
    auto* integer = integers.mutable_data_ptr<std::int64_t>();
    auto* time = times.mutable_data_ptr<double>();
    const auto add_op = [&](const Op& op) {
      *integer++ = static_cast<std::int64_t>(op.pass);
      *integer++ = op.stage;
      *integer++ = op.micro_batch;
    };
    for (const Interval& interval : intervals) {
      *integer++ = interval.rank;
      *integer++ = static_cast<std::int64_t>(interval.lane);
      add_op(interval.step.op);
      *integer++ = interval.step.overlapped.has_value() ? 1 : 0;
      add_op(interval.step.overlapped.value_or(Op{}));
      *time++ = interval.begin;
      *time++ = interval.end;
      nodes += interval.node;
      nodes += '\0';
    }
  }
  PackedIntervals(at::Tensor packed_integers, at::Tensor packed_times, std::string packed_nodes)
      : integers(std::move(packed_integers)), times(std::move(packed_times)), nodes(std::move(packed_nodes)) {}

  std::vector<Interval> unpacked() const {
    std::vector<Interval> intervals(integers.size(0));
    const auto* integer = integers.const_data_ptr<std::int64_t>();
    const auto* time = times.const_data_ptr<double>();
    const char* node = nodes.c_str();
    const auto next_op = [&] {
      const Op op{static_cast<Pass>(integer[0]), static_cast<int>(integer[1]), static_cast<int>(integer[2])};
      integer += 3;
      return op;
    };
    for (Interval& interval : intervals) {
      interval.rank = static_cast<int>(*integer++);
      interval.lane = static_cast<Lane>(*integer++);
      interval.step.op = next_op();
      const bool pair = *integer++ != 0;
      const Op overlapped = next_op();
      if (pair) interval.step.overlapped = overlapped;
      interval.begin = *time++;
      interval.end = *time++;
      interval.node = node;
      node += interval.node.size() + 1;
    }
    return intervals;
  }
};

/// [stages, 2], float64.
inline at::Tensor packed_sizes(const std::vector<StageSize>& sizes) {
  const at::Tensor packed = at::empty({static_cast<std::int64_t>(sizes.size()), 2}, at::kDouble);
  auto* number = packed.mutable_data_ptr<double>();
  for (const StageSize& size : sizes) {
    *number++ = size.parameters;
    *number++ = size.bytes;
  }
  return packed;
}

/// Of all ranks, the most of each stage.
inline std::vector<StageSize> most_of_each(const std::vector<at::Tensor>& packed) {
  std::vector<StageSize> sizes;
  for (const at::Tensor& of_rank : packed) {
    sizes.resize(std::max(sizes.size(), static_cast<std::size_t>(of_rank.size(0))));
    const auto* number = of_rank.const_data_ptr<double>();
    for (std::int64_t stage = 0; stage < of_rank.size(0); ++stage) {
      sizes[stage].parameters = std::max(sizes[stage].parameters, *number++);
      sizes[stage].bytes = std::max(sizes[stage].bytes, *number++);
    }
  }
  return sizes;
}

}  // namespace detail

void Tracer::stages(const std::vector<StageSize>& sizes) { stages_ = sizes; }

void Tracer::begin(std::int64_t step) { current_ = {detail::str("step ", step), rank_ + 1, 1, {}, stages_}; }

void Tracer::record(const Interval& interval) { current_.intervals.push_back(interval); }

void Tracer::end(bool committed) {
  if (committed) last_ = std::move(current_);
  current_ = {};
}

Timeline gather(Communicator& communicator, const Timeline& local) {
  // Clocks of different hosts have nothing in common; the end of a barrier is a moment that all ranks share.
  Communicator& hosts = communicator.control();
  hosts.barrier().wait();
  const double shared = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  const std::vector<std::string> kernels = detail::all_gather_text(communicator, detail::boot_id());
  const bool one_clock = std::set<std::string>(kernels.begin(), kernels.end()).size() == 1;

  const detail::PackedIntervals mine(local.intervals);
  const Tensors integers = hosts.all_gather(mine.integers).take();
  const Tensors times = hosts.all_gather(one_clock ? mine.times : mine.times - shared).take();
  const std::vector<std::string> nodes = detail::all_gather_text(communicator, mine.nodes);

  const Tensors sizes = hosts.all_gather(detail::packed_sizes(local.stages)).take();

  Timeline all{local.name, communicator.size(), 1, {}, detail::most_of_each(sizes)};
  double first = std::numeric_limits<double>::infinity();
  for (std::size_t rank = 0; rank < nodes.size(); ++rank) {
    for (Interval& interval : detail::PackedIntervals(integers[rank], times[rank], nodes[rank]).unpacked()) {
      first = std::min(first, interval.begin);
      all.intervals.push_back(std::move(interval));
    }
  }
  for (Interval& interval : all.intervals) {
    interval.begin -= first;
    interval.end -= first;
  }
  return all;
}

}  // namespace dualpipe
