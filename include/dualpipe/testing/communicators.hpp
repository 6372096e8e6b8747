#pragma once

#include <chrono>
#include <memory>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe::testing {

/// The strictest legal network: each rank performs one transfer at a time, and send() and receive() return only when
/// both ends have called. A program that finishes here finishes on any back end; one that does not gets a CommError, at
/// once if two ranks send to each other, else at the deadline of `inner`. Collectives block too.
std::shared_ptr<Communicator> serial(std::shared_ptr<Communicator> inner);

struct Link {
  std::chrono::nanoseconds latency{0};
  double bytes_per_second = 0;  ///< 0: unlimited. Messages of one edge (one direction) queue up behind each other.
};

/// A slower network over another one. A message starts when it is sent and its edge is free, and arrives at the
/// earliest `latency` plus its transmission time later. Waiting sleeps. A collective takes the time of the slowest edge
/// into this rank; collectives queue behind each other, not behind transfers. Sends complete as in `inner`. All ranks
/// wrap with the same link; their steady clocks must agree, as those of one host do.
std::shared_ptr<Communicator> delayed_links(std::shared_ptr<Communicator> inner, const Link& link);

}  // namespace dualpipe::testing
