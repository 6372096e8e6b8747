#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "dualpipe/comm/communicator.hpp"

// The calls of CUDA and NCCL that this back end makes, as two interfaces. Code above them needs no CUDA headers, and
// tests run it over testing::NcclEmulation; cuda.cpp implements both for real devices.
namespace dualpipe::detail {

// Opaque handles: cudaStream_t, cudaEvent_t, ncclComm_t.
using DeviceStream = struct DeviceStreamTag*;
using DeviceEvent = struct DeviceEventTag*;
using NcclComm = struct NcclCommTag*;

/// A number in page-locked memory. Any thread reads and writes it without a call of CUDA.
using DeviceFlag = std::atomic<std::uint32_t>;

/// A call of NCCL or CUDA failed; the text is the library's.
class DeviceFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Streams, events and memory of one device. Thread-safe. Each call sets its device and restores the caller's. Calls
/// that are not noexcept throw DeviceFailure.
class DeviceApi {
 public:
  virtual ~DeviceApi() = default;

  virtual at::Device device() const = 0;
  /// The calling thread's current stream, which runs what user code launches there.
  virtual DeviceStream current_stream() = 0;
  /// A high-priority stream that does not synchronize with any other.
  virtual DeviceStream create_stream() = 0;
  virtual void destroy(DeviceStream stream) noexcept = 0;

  /// @param timed  allows time_of(); events without times are cheaper.
  virtual DeviceEvent create_event(bool timed) = 0;
  virtual void destroy(DeviceEvent event) noexcept = 0;
  /// The event completes when the work queued on the stream so far completes.
  virtual void record(DeviceEvent event, DeviceStream stream) = 0;
  /// Work queued on the stream later waits for the event's latest record. The host does not wait.
  virtual void wait(DeviceStream stream, DeviceEvent event) = 0;
  virtual bool done(DeviceEvent event) = 0;
  /// Completion time in seconds of std::chrono::steady_clock. Call it only if done().
  virtual double time_of(DeviceEvent event) = 0;

  /// Flags that are 0. Making them, and dropping the last reference, may wait for the device.
  virtual std::shared_ptr<DeviceFlag[]> create_flags(std::size_t count) = 0;
  /// The stream writes the flag when it comes there.
  virtual void write_flag(DeviceStream stream, DeviceFlag& flag, std::uint32_t value) = 0;
  /// Work queued on the stream later waits until the flag is `value` or up to 2^31 - 1 more, counted cyclically. Nothing
  /// runs on the device meanwhile. The host does not wait.
  virtual void wait_for_flag(DeviceStream stream, const DeviceFlag& flag, std::uint32_t value) = 0;

  /// Memory for use on `stream`. Only work queued on that stream may still use what it held before.
  virtual at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, DeviceStream stream) = 0;

  /// Queues a copy between contiguous tensors of the same size.
  virtual void copy(const at::Tensor& to, const at::Tensor& from, DeviceStream stream) = 0;

  /// A named range of the calling thread, for profilers (NVTX).
  virtual void push_range(const std::string& name) = 0;
  virtual void pop_range() = 0;
};

using NcclId = std::array<char, 128>;

/// Thread blocks of one operation; 0: NCCL's own choice.
struct CtaLimits {
  int min = 0;
  int max = 0;
};

struct NcclConfig {
  CtaLimits ctas = {};
  std::string name = {};
};

/// The part of NCCL that this library uses. Operations are only queued on their streams. Calls that are not noexcept
/// throw DeviceFailure.
class NcclApi {
 public:
  virtual ~NcclApi() = default;

  virtual NcclId unique_id() = 0;
  /// Collective: returns when all ranks have called it.
  virtual NcclComm init(int num_ranks, const NcclId& id, int rank, const NcclConfig& config) = 0;
  /// Collective, after the last operation; waits for the other ranks.
  virtual void destroy(NcclComm comm) = 0;
  /// Ends the running operations of all `comms`, waits for this device, and frees them. Waits for no other rank. Any
  /// thread. Pass all communicators of a device in one call: operations of one may wait for those of another. Stops them
  /// before it makes any other call of CUDA.
  virtual void abort(std::span<const NcclComm> comms) noexcept = 0;
  /// The communicator's asynchronous error, if any.
  virtual std::optional<std::string> async_error(NcclComm comm) = 0;

  /// The calls of a group form one operation, whose parts progress independently.
  virtual void group_start() = 0;
  virtual void group_end() = 0;
  virtual void send(const void* data, std::size_t bytes, int peer, NcclComm comm, DeviceStream stream) = 0;
  virtual void receive(void* data, std::size_t bytes, int peer, NcclComm comm, DeviceStream stream) = 0;
  virtual void broadcast(void* data, std::size_t bytes, int root, NcclComm comm, DeviceStream stream) = 0;
  virtual void all_reduce(void* data, std::size_t count, at::ScalarType dtype, Reduce reduce, NcclComm comm,
                          DeviceStream stream) = 0;
};

/// Most calls in one NCCL group: much larger groups can hang.
inline constexpr std::size_t largest_group = 64;

/// Makes `count` calls, in groups of at most largest_group.
template <class Call>
void in_groups(NcclApi& nccl, std::size_t count, const Call& call) {
  for (std::size_t begin = 0; begin < count; begin += largest_group) {
    nccl.group_start();
    try {
      for (std::size_t i = begin; i < std::min(count, begin + largest_group); ++i) call(i);
    } catch (...) {
      try {
        nccl.group_end();
      } catch (...) {
        // The first error explains more.
      }
      throw;
    }
    nccl.group_end();
  }
}

}  // namespace dualpipe::detail
