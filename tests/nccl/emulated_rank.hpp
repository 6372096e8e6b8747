#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dualpipe/comm/local.hpp"
#include "nccl/communicator.hpp"
#include "nccl/emulation/nccl_emulation.hpp"

namespace dualpipe::test {

/// In all programs of these tests a read of host memory that was given back finds NaN.
inline const bool host_memory_is_poisoned = [] {
  testing::poison_freed_memory();
  return true;
}();

/// One rank of a test over the emulation.
struct EmulatedRank {
  std::shared_ptr<Communicator> communicator;
  std::shared_ptr<detail::DeviceApi> device;
  const testing::NcclEmulation& emulation;
};

/// Replaces a rank's device or NCCL.
using Decorate = std::function<void(int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>&)>;

/// Runs `body` on ranks that are threads, each with an NcclCommunicator over `emulation` and a local control plane.
inline void run_emulated(const testing::NcclEmulation& emulation, int num_ranks,
                         const detail::NcclCommunicatorOptions& options, const std::function<void(EmulatedRank)>& body,
                         const Decorate& decorate = nullptr) {
  run_ranks(num_ranks,
            [&](std::shared_ptr<Communicator> control) {
              std::shared_ptr<detail::DeviceApi> device = emulation.device(control->rank());
              std::shared_ptr<detail::NcclApi> nccl = emulation.nccl(control->rank());
              if (decorate) decorate(control->rank(), device, nccl);
              body({detail::NcclCommunicator::world(control, device, nccl, options), device, emulation});
            },
            {.timeout = options.timeout});
}

/// Expects no violations and no open streams.
inline void expect_clean(const testing::NcclEmulation& emulation) {
  for (const std::string& violation : emulation.violations()) ADD_FAILURE() << violation;
  EXPECT_EQ(emulation.open_streams(), 0u);
}

inline std::vector<Communicator::Edge> all_edges(int num_ranks) {
  std::vector<Communicator::Edge> edges;
  for (int from = 0; from < num_ranks; ++from)
    for (int to = 0; to < num_ranks; ++to)
      if (from != to) edges.push_back({from, to});
  return edges;
}

/// A rank whose current stream lags behind the host, as a GPU's does.
class AsyncRank {
 public:
  explicit AsyncRank(const EmulatedRank& rank) : rank_(rank), stream_(rank.device->create_stream()) {
    rank_.emulation.set_current(rank_.communicator->rank(), stream_);
  }
  ~AsyncRank() {
    rank_.emulation.synchronize(stream_);
    rank_.emulation.set_current(rank_.communicator->rank(), nullptr);
    rank_.device->destroy(stream_);
  }
  AsyncRank(const AsyncRank&) = delete;
  AsyncRank& operator=(const AsyncRank&) = delete;

  Communicator& operator*() const { return *rank_.communicator; }
  Communicator* operator->() const { return rank_.communicator.get(); }
  int rank() const { return rank_.communicator->rank(); }
  detail::DeviceStream stream() const { return stream_; }

  /// Memory for use on the stream.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) const {
    return rank_.device->empty(sizes, dtype, stream_);
  }
  /// Queues a kernel. It must hold the tensors that it uses: their memory is freed in stream order.
  void run(std::function<void()> kernel) const { rank_.emulation.run(stream_, std::move(kernel)); }
  void synchronize() const { rank_.emulation.synchronize(stream_); }

 private:
  EmulatedRank rank_;
  detail::DeviceStream stream_;
};

/// A slow kernel that fills a tensor without changing its version counter, as kernels do.
inline std::function<void()> slow_fill(at::Tensor tensor, const std::function<float(std::int64_t)>& value,
                                       std::chrono::microseconds duration) {
  return [tensor = std::move(tensor), value, duration] {
    std::this_thread::sleep_for(duration);
    float* data = tensor.mutable_data_ptr<float>();
    for (std::int64_t i = 0; i < tensor.numel(); ++i) data[i] = value(i);
  };
}

}  // namespace dualpipe::test
