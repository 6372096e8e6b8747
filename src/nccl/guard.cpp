// What ends a family in which something fails or takes too long.
#include <algorithm>

#include "nccl/family.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;

constexpr auto kGuardPeriod = 10ms;  // how soon a failure elsewhere ends what the device does here
constexpr auto kInsideNccl = 500ms;  // for somebody to come out of a call of NCCL before it is aborted

}  // namespace

// The guard sees how long it takes. Once the family has failed, the communicator may be gone.
void NcclFamily::call_nccl(Flight& flight) {
  const auto note = [this](const Request* calling) {
    const std::lock_guard lock(watch_mutex_);
    calling_ = calling;
    called_ = Clock::now();
  };
  note(&flight.whole);
  try {
    check(flight.whole);
    flight.issue(flight, *nccl_, flight.line);
  } catch (...) {
    note(nullptr);
    throw;
  }
  note(nullptr);
}

void NcclFamily::watch(std::shared_ptr<Flight> flight) {
  const std::lock_guard lock(watch_mutex_);
  watched_.push_back({std::move(flight), Clock::now() + timeout_});
}

void NcclFamily::guard() {
  std::unique_lock lock(stop_mutex_);
  while (!stop_changed_.wait_for(lock, kGuardPeriod, [this] { return stop_; })) {
    lock.unlock();
    try {
      if (failed()) {
        abort_all();
        return;
      }
      blame_what_is_late();
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
    lock.lock();
  }
}

void NcclFamily::blame_what_is_late() {
  const auto now = Clock::now();
  const std::lock_guard lock(watch_mutex_);
  if (calling_ != nullptr && now - called_ >= timeout_) {
    transport().abort(
        transport().rank(),
        str("rank ", transport().rank(), ": ", calling_->describe(),
            ": NCCL has not come back from a call for longer than the timeout of ", timeout_.count(),
            " ms. It connects when ranks first meet: one that has stopped or cannot be reached holds up the "
            "others; NCCL_DEBUG=INFO says which way it tries"));
    return;
  }
  std::erase_if(watched_, [this](const Watched& each) { return device_->done(each.flight->end.get()); });
  for (const auto& [flight, deadline] : watched_) {
    if (now < deadline) continue;
    transport().abort(flight->origin,
                      str("rank ", transport().rank(), ": ", flight->whole.describe(), ": waited for ",
                          flight->origin >= 0 ? str("rank ", flight->origin) : std::string("the device"),
                          " longer than the timeout of ", timeout_.count(),
                          " ms: the operation is launched, but the device does not come to its end"));
    return;
  }
}

void NcclFamily::abort_all() noexcept {
  std::unique_lock launching(launch_mutex_, std::try_to_lock);
  for (const auto deadline = Clock::now() + kInsideNccl; !launching && Clock::now() < deadline;) {
    std::this_thread::sleep_for(kPollPeriod);
    (void)launching.try_lock();
  }
  const std::lock_guard lock(comms_mutex_);
  aborted_ = true;
  if (!comms_.empty()) nccl_->abort(comms_);
  comms_.clear();
}

}  // namespace dualpipe::detail
