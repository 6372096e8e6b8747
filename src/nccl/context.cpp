#include "nccl/context.hpp"
#include "contact/abandonable.hpp"
#include "contact/blocked_signals.hpp"

#include <ATen/ATen.h>
#include <pthread.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <limits>
#include <optional>
#include <system_error>
#include <utility>

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;

constexpr auto drain_limit = 1500ms;  // for running operations when the last communicator is destroyed
constexpr auto poll_limit = 200us;    // for headers that peers send at about the same time, and for the device

template <class Body>
std::thread start_thread(const char* name, Body body) {
  const BlockedSignals blocked;
  return std::thread([name, body = std::move(body)] {
    pthread_setname_np(pthread_self(), name);
    body();
  });
}

/// A profiler range that ends with the block.
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

/// Wakes the launch thread when a header may have come. Separate from NcclContext: threads of the transport hold a
/// reference at times, and must not hold the last one to a context.
class NcclContext::LaunchSignal final : public TransportListener {
 public:
  void transport_changed() noexcept override {
    if (queued_ > 0) wake(false);
  }
  void queued(int change) { queued_ += change; }
  void stop() { wake(true); }
  /// False: the launch thread shall end.
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

struct NcclContext::EventPool {
  explicit EventPool(std::shared_ptr<DeviceApi> api) : device(std::move(api)) {}
  ~EventPool() {
    for (const auto* events : {&ordering, &timed})
      for (const DeviceEvent event : *events) device->destroy(event);
  }
  const std::shared_ptr<DeviceApi> device;
  std::mutex mutex;
  std::vector<DeviceEvent> ordering, timed;
};

NcclContext::NcclContext(std::shared_ptr<Transport> transport, std::shared_ptr<DeviceApi> device,
                         std::shared_ptr<NcclApi> nccl, std::chrono::milliseconds timeout, std::string name)
    : transport_(std::move(transport)),
      device_(std::move(device)),
      nccl_(std::move(nccl)),
      // A later deadline would overflow the clock.
      timeout_(std::min<std::chrono::milliseconds>(timeout, 24h * 365)),
      name_(std::move(name)),
      events_(std::make_shared<EventPool>(device_)),
      launch_signal_(std::make_shared<LaunchSignal>()),
      start_flags_(*transport_, *device_) {
  transport_->listen(launch_signal_);
  try {
    launcher_ = start_thread("dualpipe-launch", [this] { run_launcher(); });
    watchdog_ = start_thread("dualpipe-watch", [this] { run_watchdog(); });
    poller_ = start_thread("dualpipe-poll", [this] { run_poller(); });
  } catch (const std::system_error& error) {
    stop_threads();
    const std::string message = str("rank ", transport_->rank(), ": cannot start a thread: ", error.what());
    transport_->abort(transport_->rank(), message);
    throw CommError(transport_->rank(), "connect", message);
  }
}

NcclContext::~NcclContext() {
  bool all_drained = false;
  try {
    all_drained = drained(Clock::now() + drain_limit);
  } catch (...) {
    // Counts as not drained.
  }
  stop_threads();
  // Peers may read a communicator's memory until they are idle too.
  if (all_drained && !aborted_) {
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

void NcclContext::stop_threads() {
  {
    const std::lock_guard lock(stop_mutex_);
    stop_ = true;
  }
  stop_changed_.notify_all();
  launch_signal_->stop();
  for (std::thread* thread : {&launcher_, &watchdog_, &poller_})
    if (thread->joinable()) thread->join();
}

CommStream NcclContext::open(MessageCommunicator& control, const std::string& name, const CtaLimits& ctas) {
  const PlainTensors plain;
  NcclId id{};
  at::Tensor bytes = at::zeros({static_cast<std::int64_t>(id.size())}, at::kChar);
  if (control.rank() == 0) {
    id = nccl_->unique_id();
    std::memcpy(bytes.mutable_data_ptr(), id.data(), id.size());
  }
  control.broadcast({bytes}, 0).wait();
  std::memcpy(id.data(), bytes.const_data_ptr(), id.size());
  const NcclConfig config{.ctas = ctas, .name = name_ + name};
  control.barrier().wait();  // init() cannot be aborted: call it only when all ranks are here
  const NcclComm comm = init(control.size(), id, control.rank(), config);
  const std::lock_guard lock(comms_mutex_);
  if (aborted_) {
    nccl_->abort({&comm, 1});
    throw DeviceFailure("a rank failed while NCCL connected");
  }
  comms_.push_back(comm);
  streams_.push_back(device_->create_stream());
  return {comm, streams_.back()};
}

NcclComm NcclContext::init(int num_ranks, const NcclId& id, int rank, const NcclConfig& config) {
  Stopwatch watch;
  const std::optional<NcclComm> comm = result_within(
      watch, timeout_, [nccl = nccl_, num_ranks, id, rank, config] { return nccl->init(num_ranks, id, rank, config); });
  if (!comm)
    throw DeviceFailure(str("NCCL has not connected ", num_ranks, " ranks within the timeout of ", timeout_.count(),
                            " ms, though all of them were here before: one has stopped since, or cannot be reached by "
                            "NCCL's own connections; NCCL_DEBUG=INFO says which way it tries"));
  return *comm;
}

NcclContext::QueueId NcclContext::add_queue() {
  const std::lock_guard lock(launch_mutex_);
  queues_.emplace_back();
  return queues_.size() - 1;
}

EventPtr NcclContext::record(DeviceStream stream, const Request& request, bool timed) {
  std::vector<DeviceEvent>& free = timed ? events_->timed : events_->ordering;
  DeviceEvent event = nullptr;
  {
    const std::lock_guard lock(events_->mutex);
    if (!free.empty()) {
      event = free.back();
      free.pop_back();
    }
  }
  if (event == nullptr) event = on_device(request, [&](DeviceApi& device) { return device.create_event(timed); });
  EventPtr pooled(event, [pool = events_, &free](DeviceEvent returned) {
    const std::lock_guard lock(pool->mutex);
    free.push_back(returned);
  });
  on_device(request, [&](DeviceApi& device) { device.record(event, stream); });
  return pooled;
}

void NcclContext::submit(QueueId queue, std::shared_ptr<NcclOperation> operation) {
  check(operation->request);
  if (operation->polls_for_headers)
    (void)poll_briefly(poll_limit, [&] { return transport().done(operation->headers); });
  const std::lock_guard lock(launch_mutex_);
  on_device(operation->request, [this](DeviceApi& device) {
    while (!in_flight_.empty() && device.done(in_flight_.front()->end.get())) in_flight_.pop_front();
  });
  queues_[queue].push_back(std::move(operation));
  launch_signal_->queued(1);
  progress(queues_[queue]);
}

void NcclContext::progress(Queue& queue) {
  while (!queue.empty()) {
    const std::shared_ptr<NcclOperation> operation = queue.front();
    if (operation->waits_for_headers && !transport().succeeded(operation->headers)) {
      // done() lets the sockets read on; if the headers cannot come any more, wait() reports it.
      (void)transport().done(operation->headers);
      return;
    }
    if (!launch(*operation)) return;
    queue.pop_front();
    launch_signal_->queued(-1);
    if (operation->end) in_flight_.push_back(operation);
    if (operation->begin) timed_operations_.push_back(operation);
    operation->launched.store(true, std::memory_order_release);
  }
}

bool NcclContext::launch(NcclOperation& operation) {
  try {
    if (operation.waits_for_headers) transport().wait(operation.headers, operation.request);
    check(operation.request);
    const PlainTensors plain;
    if (operation.prepare) operation.prepare(operation);
    if (!operation.ready) operation.ready = record(operation.caller, operation.request);
    if (operation.issue && (moves_bytes(operation.sources) || moves_bytes(operation.targets))) issue(operation);
    return true;
  } catch (const CommError&) {
    return false;  // reported by wait()
  } catch (const std::exception& error) {
    transport().abort(transport().rank(),
                      str("rank ", transport().rank(), ": ", operation.request.describe(), ": ", error.what()));
    return false;
  }
}

void NcclContext::issue(NcclOperation& operation) {
  const DeviceStream stream = operation.comm_stream.stream;
  device_->wait(stream, operation.ready.get());
  if (operation.start != nullptr) start_flags_.await(*operation.start, stream);
  const Range range(*device_, operation.request.operation());
  if (timed_) operation.begin = record(stream, operation.request, /*timed=*/true);
  call_nccl(operation);
  operation.end = record(stream, operation.request, timed_);
}

void NcclContext::await_launch(QueueId queue, const NcclOperation& operation) {
  for (;;) {
    std::shared_ptr<NcclOperation> front;
    {
      const std::lock_guard lock(launch_mutex_);
      for (Queue& each : queues_) progress(each);
      if (operation.launched.load(std::memory_order_acquire)) return;
      front = queues_[queue].front();
    }
    transport().wait(front->headers, front->request);
  }
}

bool NcclContext::launched(QueueId queue, const NcclOperation& operation) {
  if (operation.launched.load(std::memory_order_acquire)) return true;
  const std::lock_guard lock(launch_mutex_);
  progress(queues_[queue]);
  return operation.launched.load(std::memory_order_acquire);
}

void NcclContext::synchronize(const NcclOperation& operation) {
  const auto done = [&] {
    return !operation.end ||
           on_device(operation.request, [&](DeviceApi& device) { return device.done(operation.end.get()); });
  };
  for (bool over = poll_briefly(poll_limit, done); !over; over = done()) {
    check(operation.request);
    std::this_thread::sleep_for(poll_period / 10);
  }
  check(operation.request);
}

bool NcclContext::failed() const {
  try {
    check(Request{});
    return false;
  } catch (const CommError&) {
    return true;
  }
}

void NcclContext::run_launcher() {
  while (launch_signal_->wait()) {
    const std::lock_guard lock(launch_mutex_);
    for (Queue& queue : queues_) progress(queue);
  }
}

bool NcclContext::idle() {
  const std::lock_guard lock(launch_mutex_);
  for (Queue& queue : queues_) progress(queue);
  while (!in_flight_.empty() && device_->done(in_flight_.front()->end.get())) in_flight_.pop_front();
  return in_flight_.empty() && std::all_of(queues_.begin(), queues_.end(), [](const Queue& q) { return q.empty(); });
}

bool NcclContext::drained(Clock::time_point deadline) {
  while (!idle()) {
    if (failed() || Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(poll_period);
  }
  const Header goodbye{.group = std::numeric_limits<std::int64_t>::min(),
                       .channel = Channel::collective,
                       .epoch = transport().epoch(),
                       .issued_ns = now_ns(),
                       .operation = "goodbye",
                       .signature = {}};
  std::vector<std::shared_ptr<Request>> others;
  for (int r = 0; r < transport().size(); ++r) {
    if (r == transport().rank()) continue;
    others.push_back(transport().receive(r, goodbye, /*any_signature=*/false));
    transport().send(r, {goodbye, MessageTensors::of({}), {}});
  }
  while (!transport().succeeded(others)) {
    if (transport().done(others) || Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(poll_period);
  }
  return true;
}

}  // namespace dualpipe::detail
