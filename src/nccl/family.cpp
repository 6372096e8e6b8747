#include "nccl/family.hpp"

#include <ATen/ATen.h>
#include <pthread.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <limits>
#include <utility>

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;

constexpr auto kFarewell = 1500ms;  // for what is under way when the last communicator goes
constexpr auto kBrief = 200us;      // for headers that peers send at about the same time

/// Signals are for the program's own threads.
template <class Body>
std::thread start_thread(const char* name, Body body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread([name, body = std::move(body)] {
    pthread_setname_np(pthread_self(), name);
    body();
  });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

/// A range in a profiler's view, until the end of the block.
class Range {
 public:
  Range(DeviceApi& device, const std::string& name) : device_(device) { device_.push_range(name); }
  ~Range() { device_.pop_range(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  DeviceApi& device_;
};

bool moves_bytes(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return tensor.defined() && tensor.numel() > 0; });
}

}  // namespace

/// Wakes the launching thread when a header may have come. Apart from the family, since the transport's threads hold it
/// for a moment and must never be the ones that destroy a family.
class NcclFamily::Waker final : public TransportListener {
 public:
  void transport_changed() noexcept override {
    if (queued_ > 0) wake(false);
  }
  void queued(int change) { queued_ += change; }
  void stop() { wake(true); }
  /// False: time to end.
  bool wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return woken_ || stopped_; });
    woken_ = false;
    return !stopped_;
  }

 private:
  void wake(bool stop) noexcept {
    {
      const std::lock_guard lock(mutex_);
      woken_ = true;
      stopped_ = stopped_ || stop;
    }
    changed_.notify_one();
  }

  std::atomic<int> queued_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool woken_ = false;
  bool stopped_ = false;
};

struct NcclFamily::EventPool {
  explicit EventPool(std::shared_ptr<DeviceApi> api) : device(std::move(api)) {}
  ~EventPool() {
    for (const auto* events : {&ordering, &timed})
      for (const DeviceEvent event : *events) device->destroy(event);
  }
  const std::shared_ptr<DeviceApi> device;
  std::mutex mutex;
  std::vector<DeviceEvent> ordering, timed;
};

NcclFamily::NcclFamily(std::shared_ptr<Transport> transport, std::shared_ptr<DeviceApi> device,
                       std::shared_ptr<NcclApi> nccl, std::chrono::milliseconds timeout, NcclConfig config)
    : transport_(std::move(transport)),
      device_(std::move(device)),
      nccl_(std::move(nccl)),
      // A deadline further away would leave the range of the clock.
      timeout_(std::min<std::chrono::milliseconds>(timeout, 24h * 365)),
      config_(std::move(config)),
      events_(std::make_shared<EventPool>(device_)),
      waker_(std::make_shared<Waker>()) {
  transport_->listen(waker_);
  launcher_ = start_thread("dualpipe-launch", [this] { launch_when_possible(); });
  guard_ = start_thread("dualpipe-guard", [this] { guard(); });
}

NcclFamily::~NcclFamily() {
  bool together = false;
  try {
    together = all_quiet(Clock::now() + kFarewell);
  } catch (...) {
    // Then without the others.
  }
  {
    const std::lock_guard lock(stop_mutex_);
    stop_ = true;
  }
  stop_changed_.notify_all();
  waker_->stop();
  launcher_.join();
  guard_.join();
  // Memory of a communicator may be read by a peer until that is quiet too.
  if (together && !aborted_) {
    for (const NcclComm comm : comms_) {
      try {
        nccl_->destroy(comm);
      } catch (...) {
        nccl_->abort({&comm, 1});
      }
    }
  } else {
    abort_all();
  }
  queues_.clear();
  in_flight_.clear();
  watched_.clear();
  for (const DeviceStream stream : streams_) device_->destroy(stream);
}

NcclLine NcclFamily::open(MessageCommunicator& control, const std::string& name) {
  const PlainTensors plain;
  NcclId id{};
  at::Tensor bytes = at::zeros({static_cast<std::int64_t>(id.size())}, at::kChar);
  if (control.rank() == 0) {
    id = nccl_->unique_id();
    std::memcpy(bytes.mutable_data_ptr(), id.data(), id.size());
  }
  control.broadcast({bytes}, 0).wait();
  std::memcpy(id.data(), bytes.const_data_ptr(), id.size());
  NcclConfig config = config_;
  config.name += name;
  control.barrier().wait();  // what comes now cannot be aborted: all are here, and as well as can be seen
  const NcclComm comm = nccl_->init(control.size(), id, control.rank(), config);
  const std::lock_guard lock(comms_mutex_);
  if (aborted_) {
    nccl_->abort({&comm, 1});
    throw DeviceFailure("the family failed while NCCL connected");
  }
  comms_.push_back(comm);
  streams_.push_back(device_->create_stream());
  return {comm, streams_.back()};
}

NcclFamily::QueueId NcclFamily::add_queue() {
  const std::lock_guard lock(launch_mutex_);
  queues_.emplace_back();
  return queues_.size() - 1;
}

EventPtr NcclFamily::record(DeviceStream stream, const Request& whole, bool timed) {
  std::vector<DeviceEvent>& free = timed ? events_->timed : events_->ordering;
  DeviceEvent event = nullptr;
  {
    const std::lock_guard lock(events_->mutex);
    if (!free.empty()) {
      event = free.back();
      free.pop_back();
    }
  }
  if (event == nullptr) event = on_device(whole, [&](DeviceApi& device) { return device.create_event(timed); });
  EventPtr pooled(event, [pool = events_, &free](DeviceEvent returned) {
    const std::lock_guard lock(pool->mutex);
    free.push_back(returned);
  });
  on_device(whole, [&](DeviceApi& device) { device.record(event, stream); });
  return pooled;
}

void NcclFamily::submit(QueueId queue, std::shared_ptr<Flight> flight) {
  check(flight->whole);
  if (flight->waits_briefly) {
    const auto deadline = Clock::now() + kBrief;
    while (!transport().done(flight->headers) && Clock::now() < deadline) std::this_thread::sleep_for(kPollPeriod / 10);
  }
  const std::lock_guard lock(launch_mutex_);
  on_device(flight->whole, [this](DeviceApi& device) {
    while (!in_flight_.empty() && device.done(in_flight_.front()->end.get())) in_flight_.pop_front();
  });
  queues_[queue].push_back(std::move(flight));
  waker_->queued(1);
  progress(queues_[queue]);
}

void NcclFamily::progress(Queue& queue) {
  while (!queue.empty()) {
    const std::shared_ptr<Flight> flight = queue.front();
    if (flight->waits_for_headers && !transport().succeeded(flight->headers)) {
      // Where they never will come, whoever waits for this learns it. Asking lets the sockets read on.
      (void)transport().done(flight->headers);
      return;
    }
    if (!launch(*flight)) return;
    queue.pop_front();
    waker_->queued(-1);
    if (flight->end) in_flight_.push_back(flight);
    flight->launched.store(true, std::memory_order_release);
  }
}

bool NcclFamily::launch(Flight& flight) {
  try {
    if (flight.waits_for_headers) transport().wait(flight.headers, flight.whole);
    check(flight.whole);
    const PlainTensors plain;
    if (flight.prepare) flight.prepare(flight);
    if (!flight.ready) flight.ready = record(flight.caller, flight.whole);
    if (flight.issue && (moves_bytes(flight.sources) || moves_bytes(flight.targets))) issue(flight);
    return true;
  } catch (const CommError&) {
    return false;  // the family has failed, and whoever waits for this learns it
  } catch (const std::exception& error) {
    transport().abort(transport().rank(),
                      str("rank ", transport().rank(), ": ", flight.whole.describe(), ": ", error.what()));
    return false;
  }
}

void NcclFamily::issue(Flight& flight) {
  const DeviceStream stream = flight.line.stream;
  device_->wait(stream, flight.ready.get());
  const Range range(*device_, flight.whole.operation());
  flight.begin = record(stream, flight.whole, /*timed=*/true);
  call_nccl(flight);
  flight.end = record(stream, flight.whole, /*timed=*/true);
}

void NcclFamily::await_launch(QueueId queue, const Flight& flight) {
  for (;;) {
    std::shared_ptr<Flight> front;
    {
      const std::lock_guard lock(launch_mutex_);
      for (Queue& each : queues_) progress(each);
      if (flight.launched.load(std::memory_order_acquire)) return;
      front = queues_[queue].front();
    }
    transport().wait(front->headers, front->whole);
  }
}

bool NcclFamily::launched(QueueId queue, const Flight& flight) {
  if (flight.launched.load(std::memory_order_acquire)) return true;
  const std::lock_guard lock(launch_mutex_);
  progress(queues_[queue]);
  return flight.launched.load(std::memory_order_acquire);
}

void NcclFamily::synchronize(const Flight& flight) {
  const auto done = [&](DeviceApi& device) { return device.done(flight.end.get()); };
  while (flight.end && !on_device(flight.whole, done)) {
    check(flight.whole);
    std::this_thread::sleep_for(kPollPeriod / 10);
  }
  check(flight.whole);
}

bool NcclFamily::failed() const {
  try {
    check(Request{});
    return false;
  } catch (const CommError&) {
    return true;
  }
}

void NcclFamily::launch_when_possible() {
  while (waker_->wait()) {
    const std::lock_guard lock(launch_mutex_);
    for (Queue& queue : queues_) progress(queue);
  }
}

bool NcclFamily::quiet() {
  const std::lock_guard lock(launch_mutex_);
  for (Queue& queue : queues_) progress(queue);
  while (!in_flight_.empty() && device_->done(in_flight_.front()->end.get())) in_flight_.pop_front();
  return in_flight_.empty() && std::all_of(queues_.begin(), queues_.end(), [](const Queue& q) { return q.empty(); });
}

bool NcclFamily::all_quiet(Clock::time_point deadline) {
  while (!quiet()) {
    if (failed() || Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(kPollPeriod);
  }
  const Header farewell{.group = std::numeric_limits<std::int64_t>::min(),
                        .channel = Channel::collective,
                        .epoch = transport().epoch(),
                        .issued_ns = now_ns(),
                        .operation = "farewell",
                        .signature = {}};
  std::vector<std::shared_ptr<Request>> others;
  for (int r = 0; r < transport().size(); ++r) {
    if (r == transport().rank()) continue;
    others.push_back(transport().receive(r, farewell, /*any_signature=*/false));
    transport().send(r, {farewell, MessageTensors::of({}), {}});
  }
  while (!transport().succeeded(others)) {
    if (transport().done(others) || Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(kPollPeriod);
  }
  return true;
}

}  // namespace dualpipe::detail
