#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/schedule/op.hpp"

namespace dualpipe::detail {

/// The last operations of one rank, in a ring of fixed size. Always on: an operation costs a few readings of the clock
/// and as many locks that nobody else holds, and no allocation. One thread writes, any thread reads.
class FlightRecorder {
 public:
  enum class Kind : std::uint8_t {
    compute,     ///< `step`
    send,        ///< of what step.op has made
    receive,     ///< the same
    collective,  ///< of the stages of `step`, while the host waits for it
    together,    ///< what all ranks, of all replicas, do in one order: `name` and `number` say what
  };
  /// Times are nanoseconds of std::chrono::steady_clock, 0 where it has not come so far. What has begun and not ended
  /// is what the rank does or waits for.
  struct Operation {
    Kind kind = Kind::compute;
    Step step = {};
    const char* name = "";       ///< a literal
    std::int64_t number = 0;     ///< of what ranks do together, counted from 1; alike on all ranks
    int peer = -1;               ///< of a transfer: rank of the world
    std::int64_t bytes = -1;     ///< of a transfer, where known
    std::int64_t in_step = 0;    ///< training steps before
    std::int64_t issued_ns = 0;  ///< given to the communicator
    std::int64_t began_ns = 0;   ///< the host does it, or waits for it
    std::int64_t ended_ns = 0;   ///< the host has it
  };
  /// Names an operation until it is overwritten; what is said of it afterwards is dropped.
  using Id = std::uint64_t;
  static constexpr std::size_t capacity = 512;

  /// @param ranks  of all replicas, in numbers of the world; `rank` is one of them.
  FlightRecorder(int rank, std::vector<int> ranks) : rank_(rank), ranks_(std::move(ranks)), ring_(capacity) {}

  /// What a reader of several records compares.
  ///
  /// @param run  tells pipelines apart; the same on all ranks of one.
  DUALPIPE_DECL void describe(std::string schedule, int num_stages, int num_micro_batches, std::int64_t run);
  DUALPIPE_DECL void set_step(std::int64_t step);
  /// Why the pipeline has ended; the first reason counts.
  ///
  /// @param threw  an exception of this rank itself, no CommError.
  DUALPIPE_DECL void set_failure(const std::string& reason, bool threw);

  /// Given to the communicator, and not waited for yet.
  DUALPIPE_DECL Id issue(Operation operation);
  DUALPIPE_DECL void begin(Id id);
  DUALPIPE_DECL void end(Id id, std::int64_t bytes = -1);
  /// issue() and begin().
  DUALPIPE_DECL Id start(Operation operation);
  /// Runs a collective of all ranks, which all record in the same order. What it throws leaves it begun, but for an
  /// InvalidArgument: all ranks have come to that, and go on.
  template <class Body>
  auto together(const char* name, const Body& body) {
    const Id id = start({.kind = Kind::together, .name = name, .number = ++together_});
    const Ended ended(*this, id);
    try {
      return body();
    } catch (const InvalidArgument&) {
      end(id);
      throw;
    }
  }

  /// "rank 2 did last: …", a line for each of the `count` last operations, oldest first; empty if there was none.
  DUALPIPE_DECL std::string last_lines(std::size_t count = 8) const;
  /// As planner::from_record reads it.
  DUALPIPE_DECL std::string to_json() const;

 private:
  /// Ends an operation unless an exception does.
  class Ended {
   public:
    Ended(FlightRecorder& recorder, Id id) : recorder_(recorder), id_(id), exceptions_(std::uncaught_exceptions()) {}
    Ended(const Ended&) = delete;
    Ended& operator=(const Ended&) = delete;
    ~Ended() {
      if (std::uncaught_exceptions() == exceptions_) recorder_.end(id_);
    }

   private:
    FlightRecorder& recorder_;
    Id id_;
    int exceptions_;
  };

  DUALPIPE_DECL std::vector<Operation> operations() const;  // oldest first; mutex held
  Operation* find(Id id) { return id < next_ && next_ - id <= capacity ? &ring_[id % capacity] : nullptr; }

  const int rank_;
  const std::vector<int> ranks_;
  std::int64_t together_ = 0;  // used by the rank's thread only

  mutable std::mutex mutex_;
  std::string schedule_;
  int num_stages_ = 0;
  int num_micro_batches_ = 0;
  std::int64_t run_ = 0;
  std::int64_t step_ = 0;
  std::string failure_;
  bool threw_ = false;
  std::vector<Operation> ring_;
  Id next_ = 0;
};

/// Nanoseconds since 1970, for what several hosts compare.
DUALPIPE_DECL std::int64_t wall_clock_ns();
/// What a message of these tensors holds.
DUALPIPE_DECL std::int64_t bytes_of(const Tensors& tensors);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/flight_recorder.ipp"
#endif
