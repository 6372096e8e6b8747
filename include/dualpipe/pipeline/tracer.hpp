#pragma once

#include <cstdint>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/pipeline/observer.hpp"

namespace dualpipe {

/// Keeps the intervals of one rank in the last committed step, evaluation or prediction as a Timeline in seconds.
class Tracer : public Observer {
 public:
  explicit Tracer(int rank) : rank_(rank) {}
  DUALPIPE_DECL void stages(const std::vector<StageSize>& sizes) override;
  DUALPIPE_DECL void begin(std::int64_t step) override;
  DUALPIPE_DECL void record(const Interval& interval) override;
  DUALPIPE_DECL void end(bool committed) override;
  /// The intervals of this rank, in seconds of std::chrono::steady_clock, and what it holds of each stage.
  const Timeline& last() const noexcept { return last_; }

 private:
  int rank_;
  std::vector<StageSize> stages_;
  Timeline current_, last_;
};

/// Collective: the timelines of all ranks as one, on every rank, shifted so that it begins at 0, with
/// the size of each stage on the rank that holds most of it. Ranks on one host
/// share a clock. Clocks of different hosts are aligned by the end of a barrier, to about a round trip.
DUALPIPE_DECL Timeline gather(Communicator& communicator, const Timeline& local);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/tracer.ipp"
#endif
