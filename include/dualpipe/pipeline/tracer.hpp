#pragma once

#include <memory>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/pipeline/observer.hpp"

namespace dualpipe {

/// Keeps the intervals of the most recent committed step of one rank as a Timeline in seconds.
class Tracer : public Observer {
 public:
  explicit Tracer(int rank) : rank_(rank) {}
  void begin(std::int64_t step) override;
  void record(const Interval& interval) override;
  void end(bool committed) override;
  /// This rank's share; times in seconds of std::chrono::steady_clock.
  const Timeline& last() const noexcept { return last_; }

 private:
  int rank_;
  Timeline current_, last_;
};

/// Collective: the timelines of all ranks as one, on every rank, shifted so that it begins at 0. Clocks of ranks on one
/// host agree; across hosts they are aligned by the end of a barrier, to about a round trip.
Timeline gather(Communicator& communicator, const Timeline& local);

}  // namespace dualpipe
