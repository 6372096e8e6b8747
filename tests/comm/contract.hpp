#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe::contract {

using Ptr = std::shared_ptr<Communicator>;
using Body = std::function<void(Ptr)>;

/// A back end under test. All pass the same suite; a new one needs an instantiation:
///
///   INSTANTIATE_TEST_SUITE_P(Mine, Contract, ::testing::Values(BackEnd{"mine", run_mine}), name_of);
struct BackEnd {
  std::string name;
  /// Runs the body on `num_ranks` ranks, each a thread of this process (tests compare notes in shared variables), with
  /// `timeout` as the longest wait of one operation. A rank that throws is aborted; the first failure is rethrown.
  std::function<void(int num_ranks, std::chrono::milliseconds timeout, const Body& body)> run;
  // What back ends may differ in; see Communicator.
  /// Whether send() and receive() return before the other end has called.
  bool asynchronous = true;
  /// Whether Span::begin is exact for a receive.
  bool exact_clock = true;
  /// Whether a rank may issue its transfers in any order; otherwise all ranks must keep one global order.
  bool any_order = true;
  /// Whether a send can complete, or its sender leave, before the other end has called.
  bool buffered = true;
  /// Whether all_reduce adds in rank order.
  bool rank_order = true;
  /// Whether a deadline of any operation names the rank for which all others wait.
  bool follows_waits = true;
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
inline void run_connected(int num_ranks, const std::function<Ptr(int rank)>& connect, const Body& body) {
  std::mutex mutex;
  std::exception_ptr first;
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < num_ranks; ++r) {
      threads.emplace_back([&, r] {
        Ptr communicator;
        try {
          communicator = connect(r);
          body(communicator);
        } catch (const std::exception& error) {
          {
            const std::lock_guard lock(mutex);
            if (!first) first = std::current_exception();
          }
          if (communicator) communicator->abort(error.what());
        }
      });
    }
  }
  if (first) std::rethrow_exception(first);
}

/// The CommError that `call` throws.
template <class Call>
CommError comm_error(Call&& call) {
  try {
    call();
  } catch (const CommError& error) {
    return error;
  }
  ADD_FAILURE() << "no CommError was thrown";
  return CommError(-2, "none", "none");
}

/// Same dtype, sizes and bits; NaNs with the same bits are equal.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const auto x = a.detach().contiguous();
  const auto y = b.detach().contiguous();
  return x.numel() == 0 || std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0;
}

/// Different at every position, for every `salt`, and exact in every dtype but bool.
inline at::Tensor pattern(at::IntArrayRef sizes, int salt, at::ScalarType dtype = at::kFloat) {
  const auto numel = c10::multiply_integers(sizes);
  return torch::arange(numel, at::kLong).add(salt).remainder(97).reshape(sizes).to(dtype);
}

}  // namespace dualpipe::contract
