#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/schedule/op.hpp"

namespace dualpipe::planner {

/// What one rank of a pipeline did last, as DualPipe's write_record() and DualPipeOptions::record_to leave it.
struct Record {
  enum class Kind {
    compute,     ///< `step`
    send,        ///< of what step.op has made
    receive,     ///< the same
    collective,  ///< of the stages of `step`, while the host waits for it
    together,    ///< what all ranks of the pipeline do in one order: `name`, and its `number`
  };
  /// Times are nanoseconds of the rank's own clock, 0 where it has not come so far.
  struct Operation {
    Kind kind = Kind::compute;
    Step step = {};
    std::string name = {};
    std::int64_t number = 0;
    int peer = -1;            ///< of a transfer
    std::int64_t bytes = -1;  ///< of a transfer; -1: not known
    std::int64_t in_step = 0;
    std::int64_t issued_ns = 0;  ///< given to the communicator
    std::int64_t began_ns = 0;   ///< the host does it, or waits for it
    std::int64_t ended_ns = 0;
  };

  int rank = 0;            ///< of the world, as all ranks here
  std::vector<int> ranks;  ///< of the pipeline
  std::int64_t run = 0;    ///< the same in all records of one pipeline
  std::string schedule;
  int num_stages = 0;
  int num_micro_batches = 0;
  std::int64_t step = 0;        ///< training steps before
  std::string failure;          ///< why the pipeline has ended; empty: it has not
  bool threw = false;           ///< `failure` is an exception of this rank itself, no CommError
  std::int64_t written_ns = 0;  ///< now, by the rank's own clock
  std::int64_t unix_ns = 0;     ///< now, in nanoseconds since 1970
  std::vector<Operation> operations;
};

/// @throws InvalidArgument  not JSON, not a record, of a newer version, or a member that is missing or wrong.
Record from_record(std::string_view json);

/// "receive 2F5 from rank 1, 96 bytes"
std::string to_string(const Record::Operation& operation);

/// Where a rank was when the first of the records was written.
struct RankProgress {
  int rank = 0;
  bool recorded = true;  ///< false: there is no record of it
  std::int64_t step = 0;
  std::string last = {};            ///< what it has completed last; empty: nothing that is recorded
  std::string now = {};             ///< what it does or waits in; empty: code outside of the pipeline
  double seconds = 0;               ///< for so long, or since `last`
  std::vector<int> waits_for = {};  ///< ranks
  bool waits = false;               ///< also where it is not known for whom
};

/// Which rank the others had to wait for.
struct StragglerReport {
  std::vector<RankProgress> ranks;  ///< ascending
  std::vector<int> stragglers;      ///< ranks for which others wait and that wait for nobody
  std::string verdict;              ///< one line; first the ranks that threw, and what
};

/// Follows who waits for whom. Clocks of several hosts are compared by their time since 1970.
///
/// @param incomplete  ranks without a record are taken as such that wait for nobody.
/// @throws InvalidArgument  no record; two of one rank; records of different pipelines; a rank without a record unless
///                          `incomplete`.
StragglerReport find_straggler(const std::vector<Record>& records, bool incomplete = false);

}  // namespace dualpipe::planner
