#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "nccl/api.hpp"

namespace dualpipe::testing {
namespace emulation {
struct Cluster;
}

/// Emulates NCCL and one device per rank, for tests: ranks are threads of one process, memory is the CPU's. Stricter
/// than real devices:
///
///  * A stream is a queue with a thread, which waits a random time before each task. An event completes when its stream
///    reaches it.
///  * A send and its receive complete when both have begun; nothing is buffered.
///  * A stream that waits for a flag sees it a random time after it is written. Freeing flags waits for the device.
///  * A communicator performs one operation at a time (a group is one), in launch order, whatever their streams.
///  * What NCCL leaves undefined is a violation: sizes, dtypes or collectives that do not match (the operation hangs
///    until it is aborted), a handle used after its end, a call in the wrong place.
///  * An aborted communicator stays aborted. abort() waits for the streams that it was launched on, destroy() for all
///    ranks. Waiting longer than Options::patience is a violation.
///  * Memory of DeviceApi::empty() belongs to a stream. Freed memory is reused at once on that stream, and overwritten
///    when the stream reaches the point of the free. poison_freed_memory() does the same for tensors of the host.
///
/// By default a rank's current stream is its host: work is complete when a call returns, and a wait for an event
/// blocks. So ordinary CPU code can run on it. Tests of ordering make a stream current.
class NcclEmulation {
 public:
  struct Options {
    std::uint64_t seed = 1;
    std::chrono::microseconds longest_delay{100};
    /// A device performs one operation with sends or receives at a time, over all communicators.
    bool one_transfer_at_a_time = false;
    std::chrono::milliseconds patience{60'000};
  };
  NcclEmulation(int num_ranks, const Options& options);
  explicit NcclEmulation(int num_ranks) : NcclEmulation(num_ranks, Options{}) {}
  ~NcclEmulation();

  std::shared_ptr<detail::DeviceApi> device(int rank) const;
  std::shared_ptr<detail::NcclApi> nccl(int rank) const;

  /// Makes a stream the rank's current one; null: the host.
  void set_current(int rank, detail::DeviceStream stream) const;
  /// Queues a task on a stream, as launching a kernel does.
  void run(detail::DeviceStream stream, std::function<void()> kernel) const;
  /// How many of these have begun on the rank's device while an operation of NCCL occupied it to wait for another rank.
  int kernels_beside_waiting(int rank) const;
  /// Blocks until the stream is empty.
  void synchronize(detail::DeviceStream stream) const;

  /// Loads code as the first launch of a kernel does: returns when no operation of NCCL is under way on the rank's
  /// device. Other threads' calls of the device wait for it; aborting NCCL does not. Waiting longer than
  /// Options::patience is a violation.
  void load_code(int rank) const;

  /// From now on the rank's communicators report `error` as asynchronous error.
  void break_down(int rank, const std::string& error) const;
  /// Calls whose effect NCCL leaves undefined.
  std::vector<std::string> violations() const;
  /// The rank's profiler ranges in the order of their begin, indented by two spaces per enclosing range.
  std::vector<std::string> ranges(int rank) const;
  /// Streams of all devices that have not been destroyed.
  std::size_t open_streams() const;
  /// The names of all communicators that the rank has opened.
  std::vector<std::string> communicators(int rank) const;
  /// What NCCL has connected on the rank, in order: for each communicator each peer, and each kind of collective below
  /// and above 64 KiB. NCCL connects at the first use, which blocks the host.
  std::vector<std::string> connections(int rank) const;

 private:
  class Device;
  class Nccl;
  std::shared_ptr<emulation::Cluster> cluster_;
  std::vector<std::shared_ptr<Device>> devices_;
  std::vector<std::shared_ptr<Nccl>> nccls_;
};

/// From now on CPU memory of all tensors of this process is overwritten with 0xFF (NaN) when it is freed, and reused at
/// once, last in, first out. It is never returned to the system.
void poison_freed_memory();

}  // namespace dualpipe::testing
