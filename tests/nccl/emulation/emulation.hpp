#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "nccl/api.hpp"

namespace dualpipe::testing {

/// NCCL and the devices of some ranks, emulated on the host for tests: one process, each rank a thread with a device of
/// its own, memory of the CPU. Strict where hardware may be lucky:
///
///  * A stream is a queue on a thread of its own, an event is over when the stream has come to it, and everything takes
///    a random moment more.
///  * A send and its receive are over when both ends have come to them; nothing is buffered.
///  * A communicator performs one operation (a group is one) at a time, in the order of the launches, on whatever
///    streams these were.
///  * What real NCCL leaves undefined is a violation: sizes, dtypes or collectives that do not match (the operation
///    then hangs until it is aborted), a handle used after its end, a call out of place.
///  * An aborted communicator stays aborted. abort() waits until the streams are through with what was launched on it;
///    destroy() waits for all of its ranks. What would hang for ever is a violation after Options::patience.
///  * Memory of DeviceApi::empty() belongs to a stream: given back, it is given out again at once to who works there,
///    and overwritten when the stream comes to it. poison_freed_memory() does the same to tensors of the host.
///
/// By default the current stream of a rank is its host: work is over when a call returns, and waiting for an event
/// blocks, so that ordinary CPU code can be its user. Tests of ordering set a stream of their own.
class NcclEmulation {
 public:
  struct Options {
    std::uint64_t seed = 1;
    std::chrono::microseconds longest_delay{100};
    /// A device performs one operation with sends or receives at a time, whatever their communicators.
    bool one_transfer_at_a_time = false;
    std::chrono::milliseconds patience{60'000};
  };
  NcclEmulation(int num_ranks, const Options& options);
  explicit NcclEmulation(int num_ranks) : NcclEmulation(num_ranks, Options{}) {}
  ~NcclEmulation();

  std::shared_ptr<detail::DeviceApi> device(int rank) const;
  std::shared_ptr<detail::NcclApi> nccl(int rank) const;

  /// What the rank's calls find as current from now on; null: its host.
  void set_current(int rank, detail::DeviceStream stream) const;
  /// Gives a stream something to do, as launching a kernel does.
  void run(detail::DeviceStream stream, std::function<void()> kernel) const;
  /// Blocks until the stream has nothing to do.
  void synchronize(detail::DeviceStream stream) const;

  /// The rank's communicators report `error` from now on.
  void break_down(int rank, const std::string& error) const;
  /// What was done that real NCCL leaves undefined.
  std::vector<std::string> violations() const;
  /// The names of a profiler's ranges on this rank, in the order in which they began, each indented by two spaces for
  /// every range of its thread that was open then.
  std::vector<std::string> ranges(int rank) const;
  /// Of all devices, that have not been destroyed.
  std::size_t open_streams() const;

 private:
  class Cluster;
  class Device;
  class Nccl;
  std::shared_ptr<Cluster> cluster_;
  std::vector<std::shared_ptr<Device>> devices_;
  std::vector<std::shared_ptr<Nccl>> nccls_;
};

/// From now on the CPU memory of all tensors of this process is overwritten with 0xFF (NaN) when it is given back, and
/// given out again at once, the last one first. It is never returned to the system.
void poison_freed_memory();

}  // namespace dualpipe::testing
