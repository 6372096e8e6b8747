#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <ostream>
#include <string>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe::contract {

using Body = std::function<void(std::shared_ptr<Communicator>)>;

/// A back end under test. The contract is the same for all; a new one is an instantiation:
///
///   INSTANTIATE_TEST_SUITE_P(Mine, Contract, ::testing::Values(BackEnd{"mine", run_mine}), name_of);
struct BackEnd {
  std::string name;
  /// Runs the body on `num_ranks` ranks, each a thread of this process (tests compare notes in shared variables), with
  /// `timeout` as the longest wait of one operation. A rank that throws is aborted; the first failure is rethrown.
  std::function<void(int num_ranks, std::chrono::milliseconds timeout, const Body& body)> run;
  /// Whether send() and receive() return before the other end has come to them.
  bool asynchronous = true;
  /// Whether all ranks read one clock; across hosts the difference is only estimated.
  bool exact_clock = true;
  /// Whether the transfers of a rank may be issued in any order. Otherwise they run one after the other, and all ranks
  /// must issue theirs in one global order.
  bool any_order = true;
  /// Whether a send can be over, or its sender gone, before the other end has come to it.
  bool buffered = true;
  /// Whether sums are in rank order.
  bool rank_order = true;
};
inline std::ostream& operator<<(std::ostream& out, const BackEnd& back_end) { return out << back_end.name; }
inline std::string name_of(const ::testing::TestParamInfo<BackEnd>& info) { return info.param.name; }

class Contract : public ::testing::TestWithParam<BackEnd> {
 protected:
  /// Long enough for a busy machine: a test that reaches it fails.
  static constexpr std::chrono::milliseconds ample{30'000};
  void run(int num_ranks, const Body& body, std::chrono::milliseconds timeout = ample) {
    GetParam().run(num_ranks, timeout, body);
  }
};

/// For back ends whose ranks connect themselves: `connect(rank)` is called on the rank's thread.
void run_connected(int num_ranks, const std::function<std::shared_ptr<Communicator>(int rank)>& connect,
                   const Body& body);

}  // namespace dualpipe::contract
