#include <algorithm>
#include <utility>

#include "dualpipe/detail/comm/message_communicator.hpp"

namespace dualpipe::detail {
namespace {

bool all_done(std::span<const std::shared_ptr<Request>> transfers) {
  return std::all_of(transfers.begin(), transfers.end(), [](const auto& transfer) { return transfer->done; });
}

}  // namespace

std::int64_t now_ns() noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::string Request::operation() const {
  if (header.channel == Channel::collective) return header.operation;
  return str(kind == Kind::send ? "send to rank " : "receive from rank ", peer);
}

std::string Request::describe() const {
  return str(operation(), header.channel == Channel::collective ? " (collective " : " (message ", header.sequence,
             " of group ", header.group, ")");
}

Request Request::without_message() const {
  Request copy;
  copy.kind = kind;
  copy.peer = peer;
  copy.header = header;
  return copy;
}

Request Request::collective(const Header& header) {
  Request whole;
  whole.kind = Request::Kind::receive;
  whole.header = header;
  return whole;
}

Transport::Transport(int rank, int size, std::chrono::milliseconds timeout, std::int32_t epoch, at::Device device)
    : rank_(rank),
      size_(size),
      // A deadline further away would leave the range of the clock.
      timeout_(std::min<std::chrono::milliseconds>(timeout, std::chrono::hours(24 * 365))),
      epoch_(epoch),
      device_(device),
      departed_(static_cast<std::size_t>(size), false) {
  DUALPIPE_CHECK(timeout.count() > 0, "the timeout of a communicator must be positive, got ", timeout.count(), " ms");
}

std::shared_ptr<Request> Transport::send(int to, Message message) {
  auto transfer = std::make_shared<Request>();
  transfer->kind = Request::Kind::send;
  transfer->peer = to;
  transfer->header = message.header;
  transfer->message.parcel = message.parcel;
  throw_if_failed(*transfer);
  start(to, std::move(message), transfer);
  return transfer;
}

std::shared_ptr<Request> Transport::receive(int from, Header expected, bool any_signature, std::string advice) {
  auto transfer = std::make_shared<Request>();
  transfer->kind = Request::Kind::receive;
  transfer->peer = from;
  transfer->header = std::move(expected);
  transfer->any_signature = any_signature;
  transfer->advice = std::move(advice);
  throw_if_failed(*transfer);
  std::unique_lock lock(mutex_);
  Lane& lane = lanes_[{from, transfer->header.group, transfer->header.channel}];
  if (lane.arrived.empty()) {
    lane.posted.push_back(transfer);
    return transfer;
  }
  Message message = std::move(lane.arrived.front());
  lane.arrived.pop_front();
  meet(std::move(lock), *transfer, std::move(message));
  return transfer;
}

void Transport::deliver(int from, Message message) {
  std::unique_lock lock(mutex_);
  Lane& lane = lanes_[{from, message.header.group, message.header.channel}];
  if (lane.posted.empty()) {
    lane.arrived.push_back(std::move(message));
    return;
  }
  const std::shared_ptr<Request> transfer = std::move(lane.posted.front());
  lane.posted.pop_front();
  meet(std::move(lock), *transfer, std::move(message));
}

void Transport::meet(std::unique_lock<std::mutex> lock, Request& receive, Message message) {
  const std::string problem = disagreement(receive, message.header);
  const std::function<void()> accepted = std::exchange(message.accepted, nullptr);
  if (problem.empty()) {
    receive.message = std::move(message);
    receive.completed_ns = now_ns();
    receive.done = true;
  }
  lock.unlock();
  if (!problem.empty()) {
    abort(rank_, str("rank ", rank_, ": ", receive.describe(), ": ", problem));
    return;
  }
  notify();
  if (accepted) accepted();
}

std::string Transport::disagreement(const Request& receive, const Header& got) {
  const Header& expected = receive.header;
  if (expected.epoch != got.epoch) {
    return str("expected epoch ", expected.epoch, ", got epoch ", got.epoch, " from rank ", receive.peer);
  }
  if (expected.operation != got.operation || expected.sequence != got.sequence) {
    return str("expected ", expected.operation, " ", expected.sequence, " ", to_string(expected.signature), ", got ",
               got.operation, " ", got.sequence, " ", to_string(got.signature), " from rank ", receive.peer,
               "; all ranks must call the same operations in the same order");
  }
  if (!receive.any_signature && expected.signature != got.signature) {
    return str("expected ", to_string(expected.signature), ", got ", to_string(got.signature), " from rank ",
               receive.peer, receive.advice.empty() ? "" : "; ", receive.advice);
  }
  return {};
}

void Transport::complete(const std::shared_ptr<Request>& transfer) {
  {
    const std::lock_guard lock(mutex_);
    transfer->completed_ns = now_ns();
    transfer->done = true;
  }
  notify();
}

void Transport::departed(int peer) {
  {
    const std::lock_guard lock(mutex_);
    departed_[static_cast<std::size_t>(peer)] = true;
  }
  notify();
}

bool Transport::lost(const Request& transfer) const {
  return !transfer.done && departed_[static_cast<std::size_t>(transfer.peer)];
}

bool Transport::done(std::span<const std::shared_ptr<Request>> transfers) const {
  const std::lock_guard lock(mutex_);
  if (failure_ || all_done(transfers) ||
      std::any_of(transfers.begin(), transfers.end(), [this](const auto& transfer) { return lost(*transfer); }))
    return true;
  waiting(true);
  waiting(false);
  return false;
}

bool Transport::succeeded(std::span<const std::shared_ptr<Request>> transfers) const {
  const std::lock_guard lock(mutex_);
  return !failure_ && all_done(transfers);
}

void Transport::wait(std::span<const std::shared_ptr<Request>> transfers, const Request& whole) {
  const auto deadline = std::chrono::steady_clock::now() + timeout_;
  std::unique_lock lock(mutex_);
  const Request* gone = nullptr;
  const auto over = [&] {
    for (const auto& transfer : transfers) {
      if (lost(*transfer)) gone = transfer.get();
    }
    return failure_ || gone != nullptr || all_done(transfers);
  };
  if (!over()) {
    waiting(true);
    changed_.wait_until(lock, deadline, over);
    waiting(false);
  }
  if (failure_) throw_failure(whole);
  if (gone != nullptr) {
    lock.unlock();
    raise(gone->peer, whole, str("rank ", gone->peer, " has left, having destroyed its communicator"));
  }
  std::string missing;
  int origin = -1;
  for (const auto& transfer : transfers) {
    if (transfer->done) continue;
    if (origin < 0) origin = transfer->peer;
    missing += str(missing.empty() ? "" : ", ", "rank ", transfer->peer);
  }
  if (missing.empty()) return;
  lock.unlock();
  raise(origin, whole, str("waited for ", missing, " longer than the timeout of ", timeout_.count(), " ms"));
}

void Transport::abort(int origin, const std::string& reason) noexcept {
  if (fail(origin, reason)) spread(origin, reason);
}

void Transport::failed(int origin, const std::string& reason) noexcept { fail(origin, reason); }

bool Transport::has_failed() const {
  const std::lock_guard lock(mutex_);
  return failure_.has_value();
}

bool Transport::fail(int origin, const std::string& reason) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return false;
    failure_ = Failure{origin, reason};
  }
  notify();
  return true;
}

void Transport::listen(std::weak_ptr<TransportListener> listener) {
  const std::lock_guard lock(mutex_);
  listener_ = std::move(listener);
  has_listener_ = true;
}

void Transport::notify() noexcept {
  changed_.notify_all();
  if (!has_listener_) return;
  std::shared_ptr<TransportListener> listener;
  {
    const std::lock_guard lock(mutex_);
    listener = listener_.lock();
  }
  if (listener) listener->transport_changed();
}

void Transport::raise(int origin, const Request& transfer, const std::string& problem) {
  const std::string message = str("rank ", rank_, ": ", transfer.describe(), ": ", problem);
  abort(origin, message);
  throw CommError(origin, transfer.operation(), message);
}

void Transport::throw_if_failed(const Request& transfer) const {
  const std::lock_guard lock(mutex_);
  if (failure_) throw_failure(transfer);
}

void Transport::throw_failure(const Request& transfer) const {
  throw CommError(failure_->origin, transfer.operation(),
                  str("rank ", rank_, ": ", transfer.describe(), ": failed because of rank ", failure_->origin, ": ",
                      failure_->reason));
}

}  // namespace dualpipe::detail
