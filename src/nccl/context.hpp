#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "dualpipe/detail/comm/message_communicator.hpp"
#include "dualpipe/detail/comm/stopwatch.hpp"
#include "nccl/api.hpp"
#include "nccl/operation.hpp"
#include "nccl/start_flags.hpp"

namespace dualpipe::detail {

/// Calls `done` in a loop until it is true or `limit` has passed, and returns its last result. Never sleeps: the
/// shortest sleep takes about 60 us.
template <class Done>
bool poll_briefly(std::chrono::microseconds limit, const Done& done) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (;;) {
    if (done()) return true;
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::yield();
  }
}

/// What one rank's communicators share, from the world to its smallest split: the control plane, NCCL's communicators,
/// three threads and that of StartFlags, and the first failure, which ends them all.
///
/// The launch thread launches what had to wait for announcements. The polling thread asks the device what it has
/// finished. The watchdog makes no call of CUDA but abort(): while code is loaded, CUDA holds the context's lock until
/// the device is idle, so any other call may wait for a kernel that only the abort ends.
///
/// NCCL's communicators are blocking. After the warm-up their calls only enqueue, and the watchdog ends a call that
/// does not return by abort(). Non-blocking communicators would start a thread per group and require a poll before a
/// stream is used again; they would gain an init() that can be aborted, but ranks agree over the control plane right
/// before they call it. abort() requires that no thread is inside a call of NCCL: launch_mutex_ ensures that, except
/// for a call that never returns, which abort() itself ends.
class NcclContext {
 public:
  using Clock = std::chrono::steady_clock;
  using QueueId = std::size_t;

  NcclContext(std::shared_ptr<Transport> transport, std::shared_ptr<DeviceApi> device, std::shared_ptr<NcclApi> nccl,
              std::chrono::milliseconds timeout, std::string name);
  /// Waits at most 1.5 seconds for running operations and for the other ranks, then for NCCL to free its communicators.
  ~NcclContext();
  NcclContext(const NcclContext&) = delete;
  NcclContext& operator=(const NcclContext&) = delete;

  Transport& transport() const noexcept { return *transport_; }
  const std::shared_ptr<Transport>& shared_transport() const noexcept { return transport_; }
  DeviceApi& device() const noexcept { return *device_; }

  /// Collective over `control`: a communicator of NCCL for its ranks, and its stream.
  ///
  /// @param name  goes behind the context's.
  CommStream open(MessageCommunicator& control, const std::string& name, const CtaLimits& ctas);
  /// Operations of one queue are launched in the order of submit().
  QueueId add_queue();
  /// Records a pooled event.
  ///
  /// @param request  names the operation in errors.
  /// @param timed    allows time_of().
  /// @throws CommError
  EventPtr record(DeviceStream stream, const Request& request, bool timed = false);
  /// Calls the device from the rank's thread; a failure of the device ends all ranks.
  /// @throws CommError
  template <class Call>
  auto on_device(const Request& request, const Call& call) const {
    try {
      return call(*device_);
    } catch (const DeviceFailure& error) {
      transport().raise(transport().rank(), request, error.what());
    }
  }

  /// Queues the operation. It is launched once its predecessors in the queue are and its headers allow it, by whichever
  /// thread notices first. A failure ends all ranks.
  void submit(QueueId queue, std::shared_ptr<NcclOperation> operation);
  /// Returns when the operation is launched. Launches whatever else can be, so that later work of the caller's stream
  /// is ordered behind it.
  /// @throws CommError
  void await_launch(QueueId queue, const NcclOperation& operation);
  /// Launches what can be launched; returns whether the operation is.
  bool launched(QueueId queue, const NcclOperation& operation);
  /// From now on the device has `timeout` to finish the operation.
  void watch(std::shared_ptr<NcclOperation> operation);
  /// Returns when the device has finished the operation. @throws CommError  also for a failure elsewhere meanwhile
  void synchronize(const NcclOperation& operation);

  /// As OperationTimes. The rank's thread.
  void time_operations(bool on);
  void share_times(Communicator& ranks);

  StartFlags& start_flags() noexcept { return start_flags_; }

  /// @throws CommError  if anything has failed on any rank.
  void check(const Request& request) const { transport().wait({}, request); }
  bool failed() const;

 private:
  class LaunchSignal;
  struct EventPool;
  struct Watched {
    std::shared_ptr<NcclOperation> operation;
    Clock::duration deadline{};  ///< by ran_
  };
  using Queue = std::deque<std::shared_ptr<NcclOperation>>;
  static constexpr auto poll_period = std::chrono::microseconds(100);

  /// On a thread of its own, which is left to itself when the timeout is over: init() cannot be aborted.
  /// @throws DeviceFailure
  NcclComm init(int num_ranks, const NcclId& id, int rank, const NcclConfig& config);
  void progress(Queue& queue);            // launch_mutex_ held
  bool launch(NcclOperation& operation);  // launch_mutex_ held
  void issue(NcclOperation& operation);   // launch_mutex_ held
  void call_nccl(NcclOperation& operation);
  void run_launcher();  // a thread
  void run_watchdog();  // a thread
  void run_poller();    // a thread
  void stop_threads();
  void check_deadlines();
  void forget_finished();
  /// Waits; false: the threads shall end.
  bool next_period();
  void abort_all() noexcept;
  bool idle();  // nothing is queued or running
  bool drained(Clock::time_point deadline);

  const std::shared_ptr<Transport> transport_;
  const std::shared_ptr<DeviceApi> device_;
  const std::shared_ptr<NcclApi> nccl_;
  const std::chrono::milliseconds timeout_;
  const std::string name_;
  const std::shared_ptr<EventPool> events_;
  const std::shared_ptr<LaunchSignal> launch_signal_;
  StartFlags start_flags_;

  std::mutex launch_mutex_;
  std::deque<Queue> queues_;
  bool timed_ = false;  // from now on operations are timed
  Queue timed_operations_;
  Queue in_flight_;  // launched, not known to have finished; keeps operations that nobody waits for

  std::mutex watch_mutex_;
  Stopwatch stopwatch_;
  Clock::duration ran_{};  ///< of it, when the watchdog looked last
  std::vector<Watched> watched_;
  const Request* calling_ = nullptr;  ///< the operation for which NCCL is being called
  Clock::duration called_{};          ///< by ran_

  std::mutex comms_mutex_;
  std::vector<NcclComm> comms_;
  std::vector<DeviceStream> streams_;
  bool aborted_ = false;

  std::mutex stop_mutex_;
  std::condition_variable stop_changed_;
  bool stop_ = false;
  std::thread launcher_;
  std::thread watchdog_;
  std::thread poller_;
};

}  // namespace dualpipe::detail
