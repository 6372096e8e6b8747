#pragma once

#include "dualpipe/detail/comm/transport.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <functional>
#include <utility>

namespace dualpipe::detail {

inline bool all_requests_done(std::span<const std::shared_ptr<Request>> requests) {
  return std::all_of(requests.begin(), requests.end(), [](const auto& request) { return request->done; });
}

Transport::Transport(int rank, int size, std::chrono::milliseconds timeout, std::int32_t epoch, at::Device device)
    : rank_(rank),
      size_(size),
      // A deadline further away would leave the range of the clock.
      timeout_(std::min<std::chrono::milliseconds>(timeout, std::chrono::hours(24 * 365))),
      epoch_(epoch),
      device_(device),
      departed_(size, false),
      unwound_(size, false) {
  DUALPIPE_CHECK(timeout.count() > 0, "the timeout of a communicator must be positive, got ", timeout.count(), " ms");
}

std::shared_ptr<Request> Transport::send(int to, Message message) {
  auto request = std::make_shared<Request>();
  request->kind = Request::Kind::send;
  request->peer = to;
  request->header = message.header;
  request->message.tensors = message.tensors;
  throw_if_failed(*request);
  start(to, std::move(message), request);
  return request;
}

std::shared_ptr<Request> Transport::receive(int from, Header expected, bool any_signature, std::string advice) {
  auto request = std::make_shared<Request>();
  request->kind = Request::Kind::receive;
  request->peer = from;
  request->header = std::move(expected);
  request->any_signature = any_signature;
  request->advice = std::move(advice);
  throw_if_failed(*request);
  std::unique_lock lock(mutex_);
  MatchQueue& queue = queues_[{from, request->header.group, request->header.channel}];
  if (queue.arrived.empty()) {
    queue.posted.push_back(request);
    return request;
  }
  Message message = std::move(queue.arrived.front());
  queue.arrived.pop_front();
  match(std::move(lock), *request, std::move(message));
  return request;
}

void Transport::deliver(int from, Message message) {
  std::unique_lock lock(mutex_);
  MatchQueue& queue = queues_[{from, message.header.group, message.header.channel}];
  if (queue.posted.empty()) {
    queue.arrived.push_back(std::move(message));
    return;
  }
  const std::shared_ptr<Request> request = std::move(queue.posted.front());
  queue.posted.pop_front();
  match(std::move(lock), *request, std::move(message));
}

void Transport::match(std::unique_lock<std::mutex> lock, Request& receive, Message message) {
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

void Transport::complete(const std::shared_ptr<Request>& request) {
  {
    const std::lock_guard lock(mutex_);
    request->completed_ns = now_ns();
    request->done = true;
  }
  notify();
}

void Transport::departed(int peer, bool unwound) {
  {
    const std::lock_guard lock(mutex_);
    departed_[peer] = true;
    unwound_[peer] = unwound;
  }
  notify();
}

bool Transport::lost(const Request& request) const { return !request.done && departed_[request.peer]; }

bool Transport::done(std::span<const std::shared_ptr<Request>> requests) const {
  const std::lock_guard lock(mutex_);
  if (failure_ || all_requests_done(requests) ||
      std::any_of(requests.begin(), requests.end(), [this](const auto& request) { return lost(*request); }))
    return true;
  waiting(true);
  waiting(false);
  return false;
}

bool Transport::succeeded(std::span<const std::shared_ptr<Request>> requests) const {
  const std::lock_guard lock(mutex_);
  return !failure_ && all_requests_done(requests);
}

void Transport::wait(std::span<const std::shared_ptr<Request>> requests, const Request& whole) {
  Stopwatch watch;
  std::unique_lock lock(mutex_);
  const Request* gone = nullptr;
  const auto over = [&] {
    for (const auto& request : requests) {
      if (lost(*request)) gone = request.get();
    }
    return failure_ || gone != nullptr || all_requests_done(requests);
  };
  if (over()) {
    if (failure_) throw_failure(whole);
  } else {
    begin_wait({.operation = whole.describe(), .requests = {requests.begin(), requests.end()}});
    waiting(true);
    if (!watch.wait(changed_, lock, half_time(), over)) {
      const std::vector<int> missing = missing_of(requests);
      lock.unlock();
      warn_of_wait(whole, missing);
      lock.lock();
      watch.wait(changed_, lock, timeout_, over);
    }
    waiting(false);
  }
  const std::vector<int> missing = failure_ || gone != nullptr ? std::vector<int>() : missing_of(requests);
  std::optional<CommError> error;
  if (!missing.empty()) {
    lock.unlock();
    error = overdue(whole, missing);
    lock.lock();
  }
  if (!failure_ && gone != nullptr) error = has_left(whole, gone->peer);
  if (!failure_ && error) {
    // Before the wait ends: ranks that ask meanwhile must not take this one for the end of their chain.
    lock.unlock();
    abort(error->origin_rank(), error->what());
    lock.lock();
    end_wait();
    throw *error;
  }
  end_wait();
  if (failure_) throw_failure(whole);
}

std::vector<std::string> Transport::commit(std::int64_t group, const std::vector<int>& members, std::string ballot) {
  Request whole =
      Request::collective({.group = group, .channel = Channel::collective, .operation = "commit", .signature = {}});
  throw_if_failed(whole);
  whole.header.sequence = vote(group, members, std::move(ballot));
  const std::uint64_t step = whole.header.sequence;
  {
    const std::lock_guard lock(mutex_);
    begin_wait({.operation = whole.describe(), .group = group, .members = members, .step = step});
  }
  Stopwatch watch;
  const auto is_open = [](const StepEnd& end) { return end.outcome == StepOutcome::open && !end.has_left; };
  StepEnd end = wait_for_step(group, members, step, watch, half_time());
  if (is_open(end)) {
    warn_of_wait(whole, end.missing);
    end = wait_for_step(group, members, step, watch, timeout_);
  }
  std::optional<CommError> own;
  if (end.outcome == StepOutcome::open) {
    if (end.has_left) {
      const std::lock_guard lock(mutex_);
      own = has_left(whole, end.missing.front());
    } else {
      own = overdue(whole, end.missing);
    }
    abort(own->origin_rank(), own->what());
    watch = {};
    end = wait_for_step(group, members, step, watch, timeout_);  // it may have ended since
  }
  {
    const std::lock_guard lock(mutex_);
    end_wait();
  }
  if (end.outcome == StepOutcome::over) return std::move(end.ballots);
  const std::lock_guard lock(mutex_);
  if (end.outcome == StepOutcome::rolled_back && own) throw *own;
  if (end.outcome == StepOutcome::rolled_back) throw_failure(whole);
  throw_failure(whole,
                "\n  This rank was cut off from the others, which may have ended the step without it: go back to a "
                "checkpoint.");
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

void Transport::raise(int origin, const Request& request, const std::string& problem) {
  const std::string message = report(request, problem);
  abort(origin, message);
  throw CommError(origin, request.operation(), message);
}

void Transport::throw_if_failed(const Request& request) const {
  const std::lock_guard lock(mutex_);
  if (failure_) throw_failure(request);
}

void Transport::throw_failure(const Request& request, const std::string& more) const {
  throw CommError(failure_->origin, request.operation(),
                  report(request, str("failed because of rank ", failure_->origin, ": ", failure_->reason, more)));
}

std::string Transport::report(const Request& request, const std::string& problem) const {
  return str("rank ", rank_, ": ", request.describe(), ": ", problem);
}

std::vector<int> Transport::missing_of(std::span<const std::shared_ptr<Request>> requests) const {
  std::vector<int> missing;
  for (const auto& request : requests)
    if (!request->done) missing.push_back(request->peer);
  return missing;
}

void Transport::warn_of_wait(const Request& request, const std::vector<int>& missing) const {
  const double half = std::chrono::duration<double>(timeout_).count() / 2;
  TORCH_WARN(
      report(request, str("has waited ", half, " s for ", list_of_ranks(missing), " and gives up in ", half, " s")));
}

CommError Transport::overdue(const Request& request, const std::vector<int>& missing) {
  const Culprit culprit = find_culprit(rank_, missing, [this](int other) { return ask(other); });
  return {culprit.rank, request.operation(),
          report(request, str("waited for ", list_of_ranks(missing), " longer than the timeout of ", timeout_.count(),
                              " ms", culprit.chain))};
}

CommError Transport::has_left(const Request& request, int peer) const {
  return {peer, request.operation(),
          report(request,
                 str("rank ", peer, " has left, having destroyed its communicator",
                     unwound_[peer] ? " while an exception unwound it; its own output or launcher tells which" : ""))};
}

void Transport::begin_wait(Wait wait) {
  wait_ = std::move(wait);
  wait_changed_ = Clock::now();
}

void Transport::end_wait() {
  if (!wait_) return;
  last_wait_ = std::move(wait_->operation);
  wait_.reset();
  wait_changed_ = Clock::now();
}

void Transport::was_stopped(Clock::duration time) {
  const std::lock_guard lock(mutex_);
  wait_changed_ = std::min(wait_changed_ + time, Clock::now());  // it may have changed since
}

RankActivity Transport::activity() const {
  const std::lock_guard lock(mutex_);
  const std::chrono::duration<double> since = Clock::now() - wait_changed_;
  // A rank that knows of a failure elsewhere is not where it began.
  if (failure_ && failure_->origin != rank_)
    return {
        .waits_for = {failure_->origin}, .operation = wait_ ? wait_->operation : last_wait_, .seconds = since.count()};
  if (!wait_) return {.waits_for = {}, .operation = last_wait_, .seconds = since.count()};
  return {.waits_for = wait_->members.empty() ? missing_of(wait_->requests)
                                              : missing_votes(wait_->group, wait_->members, wait_->step),
          .operation = wait_->operation,
          .seconds = since.count()};
}

}  // namespace dualpipe::detail
