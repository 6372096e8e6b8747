#pragma once

#include <chrono>
#include <memory>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe::testing {

/// The strictest legal network: each rank performs one transfer at a time, and send() and receive() return only when
/// both ends have come to it. A program that finishes here finishes on any back end; one that does not gets a
/// CommError, at once where two ranks send to each other, else at the deadline of `inner`. Collectives are blocking
/// too.
std::shared_ptr<Communicator> serial(std::shared_ptr<Communicator> inner);

struct Link {
  std::chrono::nanoseconds latency{0};
  double bytes_per_second = 0;  ///< 0: unlimited. Messages of one direction of one edge queue up behind each other.
};

/// A slower network around another one: what is received arrives at the earliest `latency` plus its transmission time
/// after both it was sent and the edge was free. Waiting costs no processor time. Collectives are slowed by the slowest
/// of the edges into this rank; they queue behind each other, not behind transfers. Sends are over as soon as they are
/// inside. All ranks wrap with the same link; their steady clocks must agree, as those of one host do.
std::shared_ptr<Communicator> delayed_links(std::shared_ptr<Communicator> inner, const Link& link);

}  // namespace dualpipe::testing
