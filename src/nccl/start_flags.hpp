#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "dualpipe/detail/comm/transport.hpp"
#include "nccl/api.hpp"

namespace dualpipe::detail {

/// Starts a transfer on both devices at once, when both have come to it. Else the kernel of the first would occupy its
/// device until the second comes.
///
/// Each end has two flags, which count transfers. A stream that comes to a transfer writes the first flag, then waits
/// for the second. A thread carries the first flag of each end to the second of the other, over the control plane. It
/// makes no call of CUDA, and does not need the rank's own thread, which may be in a call of CUDA that waits for the
/// device, and so for these flags.
class StartFlags {
 public:
  /// One end of an edge, in one direction.
  struct End {
    int peer = 0;            ///< rank of the transport
    std::int64_t group = 0;  ///< of the edge's communicator
    bool sends = false;
    DeviceFlag* here = nullptr;  ///< transfers to which this end's stream has come
    DeviceFlag* there = nullptr;
    std::uint32_t queued = 0;                          ///< transfers given to the stream
    std::uint32_t told = 0;                            ///< to the peer, of `here`
    std::uint32_t heard = 0;                           ///< from the peer
    std::deque<std::shared_ptr<Request>> posted = {};  ///< what the peer has not said yet
  };

  StartFlags(Transport& transport, DeviceApi& device) : transport_(transport), device_(device) {}
  ~StartFlags();
  StartFlags(const StartFlags&) = delete;
  StartFlags& operator=(const StartFlags&) = delete;

  /// Ends that live as long as `*this`. Allocates page-locked memory, which may wait for the device.
  /// @throws DeviceFailure
  std::vector<End*> add(const std::vector<End>& ends);
  /// Work queued on the stream later starts when both ends have come to this point. Both ends call it for the same
  /// transfers, in one order.
  /// @throws CommError, DeviceFailure
  void await(End& end, DeviceStream stream);
  /// Lets all streams go on, for ever. Any thread.
  void release() noexcept;

 private:
  Header header(const End& end, bool from_sender, std::uint32_t number) const;
  void run();  // the thread
  bool carries() const;
  void carry(End& end);

  Transport& transport_;
  DeviceApi& device_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<DeviceFlag[]>> flags_;
  std::deque<End> ends_;
  bool released_ = false;
  bool stop_ = false;
  std::thread carrier_;
};

}  // namespace dualpipe::detail
