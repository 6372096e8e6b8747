#include "dualpipe/pipeline/tracer.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <limits>
#include <set>

#include "dualpipe/detail/pipeline/agree.hpp"
#include "dualpipe/planner/trace.hpp"

namespace dualpipe {
namespace {

/// Tells machines apart whose steady clocks have nothing in common.
std::string boot_id() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  return id;
}

}  // namespace

void Tracer::begin(std::int64_t step) { current_ = {detail::str("step ", step), rank_ + 1, 1, {}}; }

void Tracer::record(const Interval& interval) { current_.intervals.push_back(interval); }

void Tracer::end(bool committed) {
  if (committed) last_ = std::move(current_);
  current_ = {};
}

Timeline gather(Communicator& communicator, const Timeline& local) {
  // Clocks of different hosts have nothing in common; the end of a barrier is a moment that all ranks share.
  communicator.barrier().wait();
  const double shared = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  Timeline sent = local;
  sent.num_ranks = communicator.size();
  const std::vector<std::string> hosts = all_gather_text(communicator, boot_id());
  if (std::set<std::string>(hosts.begin(), hosts.end()).size() > 1)
    for (Interval& interval : sent.intervals) {
      interval.begin -= shared;
      interval.end -= shared;
    }

  Timeline all{local.name, communicator.size(), 1, {}};
  double first = std::numeric_limits<double>::infinity();
  for (const std::string& text : all_gather_text(communicator, planner::to_trace(sent))) {
    for (Interval& interval : planner::from_trace(text).intervals) {
      first = std::min(first, interval.begin);
      all.intervals.push_back(interval);
    }
  }
  for (Interval& interval : all.intervals) {
    interval.begin -= first;
    interval.end -= first;
  }
  return all;
}

}  // namespace dualpipe
