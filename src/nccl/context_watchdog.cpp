// The watchdog of NcclContext: deadlines, asynchronous errors, abort.
#include <algorithm>

#include "nccl/context.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;

constexpr auto watchdog_period = 10ms;     // a failure elsewhere aborts this device's operations within this time
constexpr auto nccl_return_limit = 500ms;  // a call of NCCL may take so long to return before it is aborted

}  // namespace

// Notes the call for the watchdog's deadline. The check comes after that: a failed context has no communicators.
void NcclContext::call_nccl(NcclOperation& operation) {
  const auto note = [this](const Request* calling) {
    const std::lock_guard lock(watch_mutex_);
    calling_ = calling;
    called_ = ran_;
  };
  note(&operation.request);
  try {
    check(operation.request);
    operation.issue(operation, *nccl_, operation.comm_stream);
  } catch (...) {
    note(nullptr);
    throw;
  }
  note(nullptr);
}

void NcclContext::watch(std::shared_ptr<NcclOperation> operation) {
  const std::lock_guard lock(watch_mutex_);
  watched_.push_back({std::move(operation), ran_ + timeout_});
}

bool NcclContext::next_period() {
  std::unique_lock lock(stop_mutex_);
  return !stop_changed_.wait_for(lock, watchdog_period, [this] { return stop_; });
}

void NcclContext::run_watchdog() {
  while (next_period()) {
    try {
      if (failed()) {
        abort_all();
        return;
      }
      check_deadlines();
      const std::lock_guard comms_lock(comms_mutex_);
      for (const NcclComm comm : comms_) {
        const auto error = nccl_->async_error(comm);
        if (!error) continue;
        transport().abort(transport().rank(), str("rank ", transport().rank(), ": NCCL: ", *error));
        break;
      }
    } catch (const std::exception& error) {
      transport().abort(transport().rank(), str("rank ", transport().rank(), ": ", error.what()));
    }
  }
}

void NcclContext::run_poller() {
  while (next_period()) {
    try {
      forget_finished();
    } catch (const std::exception& error) {
      transport().abort(transport().rank(), str("rank ", transport().rank(), ": ", error.what()));
      return;
    }
  }
}

void NcclContext::forget_finished() {
  std::vector<Watched> watched;
  {
    const std::lock_guard lock(watch_mutex_);
    watched = watched_;
  }
  std::erase_if(watched, [this](const Watched& each) { return !device_->done(each.operation->end.get()); });
  const std::lock_guard lock(watch_mutex_);
  for (const Watched& finished : watched)
    std::erase_if(watched_, [&](const Watched& each) { return each.operation == finished.operation; });
}

void NcclContext::check_deadlines() {
  const std::lock_guard lock(watch_mutex_);
  ran_ = stopwatch_.elapsed();
  if (calling_ != nullptr && ran_ - called_ >= timeout_) {
    transport().abort(
        transport().rank(),
        str("rank ", transport().rank(), ": ", calling_->describe(),
            ": NCCL has not come back from a call for longer than the timeout of ", timeout_.count(),
            " ms. It connects when ranks first meet: one that has stopped or cannot be reached holds up the "
            "others; NCCL_DEBUG=INFO says which way it tries"));
    return;
  }
  for (const auto& [operation, deadline] : watched_) {
    if (ran_ < deadline) continue;
    transport().abort(
        operation->blamed_rank,
        str("rank ", transport().rank(), ": ", operation->request.describe(), ": waited for ",
            operation->blamed_rank >= 0 ? str("rank ", operation->blamed_rank) : std::string("the device"),
            " longer than the timeout of ", timeout_.count(),
            " ms: the operation is launched, but the device does not come to its end"));
    return;
  }
}

// The flags go first: a stream that waits for one would hold up the abort, or a call of CUDA that holds launch_mutex_.
void NcclContext::abort_all() noexcept {
  start_flags_.release();
  std::unique_lock launching(launch_mutex_, std::try_to_lock);
  for (const auto deadline = Clock::now() + nccl_return_limit; !launching && Clock::now() < deadline;) {
    std::this_thread::sleep_for(poll_period);
    (void)launching.try_lock();
  }
  const std::lock_guard lock(comms_mutex_);
  aborted_ = true;
  if (!comms_.empty()) nccl_->abort(comms_);
  comms_.clear();
}

}  // namespace dualpipe::detail
