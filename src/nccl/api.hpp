#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "dualpipe/comm/communicator.hpp"

// What the NCCL back end asks of NCCL and of the device, as two tables of functions. Everything above them compiles
// without CUDA's headers and runs over testing::NcclEmulation; nccl_cuda.cpp holds the real ones.
namespace dualpipe::detail {

// cudaStream_t, cudaEvent_t and ncclComm_t where no CUDA header is seen.
using DeviceStream = struct DeviceStreamTag*;
using DeviceEvent = struct DeviceEventTag*;
using NcclComm = struct NcclCommTag*;

/// A call of NCCL or CUDA that failed, with what the library says about it.
class DeviceFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Streams, events and memory of one device. Any thread; each call sets the device that it needs and puts the
/// caller's back. All throw DeviceFailure.
class DeviceApi {
 public:
  virtual ~DeviceApi() = default;

  virtual at::Device device() const = 0;
  /// That of the calling thread: work that user code gives the device there goes to it.
  virtual DeviceStream current_stream() = 0;
  /// Of high priority, ordered with no other stream unless told so.
  virtual DeviceStream create_stream() = 0;
  virtual void destroy(DeviceStream stream) noexcept = 0;

  /// @param timed  time_of() may ask for it; what only orders streams is cheaper without.
  virtual DeviceEvent create_event(bool timed) = 0;
  virtual void destroy(DeviceEvent event) noexcept = 0;
  /// The event is over when all that the stream was given before is.
  virtual void record(DeviceEvent event, DeviceStream stream) = 0;
  /// What the stream is given from now on waits for the event as it was recorded last. The host does not wait.
  virtual void wait(DeviceStream stream, DeviceEvent event) = 0;
  virtual bool done(DeviceEvent event) = 0;
  /// When the event was over, in seconds of std::chrono::steady_clock; only if it is.
  virtual double time_of(DeviceEvent event) = 0;

  /// Memory for work on `stream`: what used it before may still be under way there, and nowhere else.
  virtual at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, DeviceStream stream) = 0;

  /// Copies memory of the same size, contiguous both, when the stream comes to it.
  virtual void copy(const at::Tensor& to, const at::Tensor& from, DeviceStream stream) = 0;

  /// A range of the calling thread in a profiler's view.
  virtual void push_range(const std::string& name) = 0;
  virtual void pop_range() = 0;
};

using NcclId = std::array<char, 128>;

struct NcclConfig {
  int min_ctas = 0;  ///< 0: NCCL's own choice
  int max_ctas = 0;
  std::string name = {};
};

/// NCCL, as far as this library uses it, for the ranks of one device. Calls on streams only enqueue. All throw
/// DeviceFailure.
class NcclApi {
 public:
  virtual ~NcclApi() = default;

  virtual NcclId unique_id() = 0;
  /// Returns when all ranks have called it.
  virtual NcclComm init(int num_ranks, const NcclId& id, int rank, const NcclConfig& config) = 0;
  /// Collective, after the last operation; waits for the others.
  virtual void destroy(NcclComm comm) = 0;
  /// Ends what runs on them, and frees them; from any thread. Waits until the device is through with what was launched
  /// on each, for no other rank. Operations of one may wait for those of another: what a device has is aborted at once.
  virtual void abort(std::span<const NcclComm> comms) noexcept = 0;
  /// What went wrong in the background, if anything.
  virtual std::optional<std::string> async_error(NcclComm comm) = 0;

  /// Calls of a group are one operation: its parts progress independently of each other.
  virtual void group_start() = 0;
  virtual void group_end() = 0;
  virtual void send(const void* data, std::size_t bytes, int peer, NcclComm comm, DeviceStream stream) = 0;
  virtual void receive(void* data, std::size_t bytes, int peer, NcclComm comm, DeviceStream stream) = 0;
  virtual void broadcast(void* data, std::size_t bytes, int root, NcclComm comm, DeviceStream stream) = 0;
  virtual void all_reduce(void* data, std::size_t count, at::ScalarType dtype, Reduce reduce, NcclComm comm,
                          DeviceStream stream) = 0;
};

/// Calls of NCCL in one group. Larger ones can hang.
constexpr std::size_t kLargestGroup = 64;

/// `count` calls, as many at a time as one group may have.
template <class Call>
void in_groups(NcclApi& nccl, std::size_t count, const Call& call) {
  for (std::size_t begin = 0; begin < count; begin += kLargestGroup) {
    nccl.group_start();
    try {
      for (std::size_t i = begin; i < std::min(count, begin + kLargestGroup); ++i) call(i);
    } catch (...) {
      try {
        nccl.group_end();
      } catch (...) {
        // The first error says more.
      }
      throw;
    }
    nccl.group_end();
  }
}

}  // namespace dualpipe::detail
