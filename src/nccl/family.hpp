#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "dualpipe/detail/comm/message_communicator.hpp"
#include "nccl/api.hpp"

namespace dualpipe::detail {

/// Goes back to the pool that it came from.
using EventPtr = std::shared_ptr<std::remove_pointer_t<DeviceEvent>>;

/// A communicator of NCCL, and the stream on which its operations run.
struct NcclLine {
  NcclComm comm = nullptr;
  DeviceStream stream = nullptr;
};

/// One operation on its way to the device and through it.
struct Flight {
  // Set before it is submitted, constant afterwards.
  Request whole;                                  ///< names it
  std::vector<std::shared_ptr<Request>> headers;  ///< what peers say of it
  bool waits_for_headers = true;                   ///< before it is launched
  /// Worth a moment of the host where headers are on their way: what allocates when they have come runs behind all that
  /// the caller's stream was given until then.
  bool waits_briefly = false;
  int origin = -1;  ///< whom to blame where the device does not come to its end
  NcclLine line;
  DeviceStream caller = nullptr;         ///< the stream that was current when it was issued
  EventPtr ready;                        ///< what it waits for; null: recorded on `caller` after prepare()
  std::function<void(Flight&)> prepare;  ///< may be null
  std::function<void(const Flight&, NcclApi&, NcclLine)> issue;  ///< null: nothing for the device

  // Set when it is launched.
  Tensors sources;  ///< what the device reads
  Tensors targets;  ///< what it writes
  EventPtr begin, end;
  std::atomic<bool> launched{false};
};

/// What all communicators of a family share on one rank: the control plane, NCCL's communicators, the threads that
/// launch and watch, and the end of everything when something fails.
///
/// The choice between blocking and non-blocking communicators of NCCL is made here: blocking ones, ended by abort()
/// from a thread of our own. Once edges are warmed up, their calls do nothing but enqueue. In the other mode every
/// group ends in a thread that NCCL starts, and a stream may be used again only when a poll says so, for every single
/// transfer; what it would give is that init() can be aborted, which matters less as all ranks agree by the control
/// plane that they are about to call it. abort() asks that nobody be inside a call: launch_mutex_ sees to that, and
/// where somebody does not come out again, abort() is what ends it.
class NcclFamily {
 public:
  using Clock = std::chrono::steady_clock;
  using QueueId = std::size_t;

  NcclFamily(std::shared_ptr<Transport> transport, std::shared_ptr<DeviceApi> device, std::shared_ptr<NcclApi> nccl,
             std::chrono::milliseconds timeout, NcclConfig config);
  /// Gives what is under way a moment to end, and peers one to say the same of theirs: 1.5 seconds at most. Then comes
  /// what NCCL takes to end its communicators.
  ~NcclFamily();
  NcclFamily(const NcclFamily&) = delete;
  NcclFamily& operator=(const NcclFamily&) = delete;

  Transport& transport() const noexcept { return *transport_; }
  const std::shared_ptr<Transport>& shared_fabric() const noexcept { return transport_; }
  DeviceApi& device() const noexcept { return *device_; }

  /// Collective over `control`: a communicator of NCCL for its ranks, and a stream for it.
  NcclLine open(MessageCommunicator& control, const std::string& name);
  /// The operations of one queue are launched in the order in which they are submitted.
  QueueId add_queue();
  /// @param whole  what it is for, to name it in errors.
  /// @param timed  the device can be asked when it was.
  /// @throws CommError
  EventPtr record(DeviceStream stream, const Request& whole, bool timed = false);
  /// What the rank's thread asks of the device; its failure ends the family.
  /// @throws CommError
  template <class Call>
  auto on_device(const Request& whole, const Call& call) const {
    try {
      return call(*device_);
    } catch (const DeviceFailure& error) {
      transport().raise(transport().rank(), whole, error.what());
    }
  }

  /// Launches it as soon as what is before it in the queue, and what it waits for, allows. A failure ends the family.
  void submit(QueueId queue, std::shared_ptr<Flight> flight);
  /// Returns when it is launched, and all that can be is: what the caller's stream is given next is behind it.
  /// @throws CommError
  void await_launch(QueueId queue, const Flight& flight);
  /// Whether it is launched, or never will be.
  bool launched(QueueId queue, const Flight& flight);
  /// From now on the device has `timeout` to come to its end.
  void watch(std::shared_ptr<Flight> flight);
  /// Returns when the device is through with what is watched. @throws CommError  also of what failed meanwhile
  void synchronize(const Flight& flight);

  /// @throws CommError  the family has failed.
  void check(const Request& whole) const { transport().wait({}, whole); }
  bool failed() const;

 private:
  class Waker;
  struct EventPool;
  struct Watched {
    std::shared_ptr<Flight> flight;
    Clock::time_point deadline;
  };
  using Queue = std::deque<std::shared_ptr<Flight>>;
  static constexpr auto kPollPeriod = std::chrono::microseconds(100);

  void progress(Queue& queue);  // launch_mutex_ held
  bool launch(Flight& flight);  // launch_mutex_ held
  void issue(Flight& flight);   // launch_mutex_ held
  void call_nccl(Flight& flight);
  void launch_when_possible();  // a thread
  void guard();                 // a thread
  void blame_what_is_late();
  void abort_all() noexcept;
  bool quiet();  // nothing is queued, nothing under way
  bool all_quiet(Clock::time_point deadline);

  const std::shared_ptr<Transport> transport_;
  const std::shared_ptr<DeviceApi> device_;
  const std::shared_ptr<NcclApi> nccl_;
  const std::chrono::milliseconds timeout_;
  const NcclConfig config_;
  const std::shared_ptr<EventPool> events_;
  const std::shared_ptr<Waker> waker_;

  std::mutex launch_mutex_;
  std::deque<Queue> queues_;
  Queue in_flight_;  // launched, with an end to come; drops what nobody waited for

  std::mutex watch_mutex_;
  std::vector<Watched> watched_;
  const Request* calling_ = nullptr;  ///< what NCCL is just called for
  Clock::time_point called_;

  std::mutex comms_mutex_;
  std::vector<NcclComm> comms_;
  std::vector<DeviceStream> streams_;
  bool aborted_ = false;

  std::mutex stop_mutex_;
  std::condition_variable stop_changed_;
  bool stop_ = false;
  std::thread launcher_;
  std::thread guard_;
};

}  // namespace dualpipe::detail
