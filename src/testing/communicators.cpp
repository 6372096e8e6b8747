#include "dualpipe/testing/communicators.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <utility>

namespace dualpipe::testing {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point time) { return std::chrono::duration<double>(time.time_since_epoch()).count(); }

/// Forwards to `inner` what no wrapper changes.
class Wrapper : public Communicator {
 public:
  explicit Wrapper(std::shared_ptr<Communicator> inner)
      : Communicator(inner->rank(), inner->size()), inner_(std::move(inner)) {}
  int world_rank(int rank) const override { return inner_->world_rank(rank); }
  at::Device device() const override { return inner_->device(); }
  Communicator& control() override {
    Communicator& inner = inner_->control();
    return &inner == inner_.get() ? *this : inner;
  }
  bool gains_from_expected() const noexcept override { return inner_->gains_from_expected(); }
  DeviceTrace* device_trace() noexcept override { return inner_->device_trace(); }
  detail::SharedValues* shared_values() noexcept override { return inner_->shared_values(); }
  std::vector<std::string> commit(std::string ballot) override { return inner_->commit(std::move(ballot)); }
  Pending fence() override { return inner_->fence(); }
  void connect(const std::vector<Edge>& edges) override { inner_->connect(edges); }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }

 protected:
  std::shared_ptr<Communicator> inner_;
};

// ---- serial

/// The receiver's answer, with a shape that nobody else sends.
Tensors acknowledgement() { return {at::empty({0, 'a', 'c', 'k'}, at::kChar)}; }

/// A transfer that is already complete. Waiting again still notices an abort.
class Finished final : public Pending::State {
 public:
  Finished(Pending inner, Tensors tensors) : inner_(std::move(inner)), tensors_(std::move(tensors)) {}
  void wait() override { inner_.wait(); }
  bool done() const override { return true; }
  Tensors take() override {
    wait();
    DUALPIPE_CHECK(!std::exchange(taken_, true), "the tensors of this transfer were taken before");
    return std::move(tensors_);
  }
  Span span() const override { return inner_.span(); }

 private:
  Pending inner_;
  Tensors tensors_;
  bool taken_ = false;
};

class Serial final : public Wrapper {
 public:
  using Wrapper::Wrapper;

  Pending send(int peer, Tensors tensors) override {
    const Turn turn(busy_, "send");
    Pending sent = inner_->send(peer, std::move(tensors));
    const Tensors answer = inner_->receive(peer).take();
    if (signature_of(answer) != signature_of(acknowledgement())) {
      const std::string operation = detail::str("send to rank ", peer);
      const std::string message =
          detail::str("rank ", rank(), ": ", operation, ": rank ", peer, " sends ", to_string(signature_of(answer)),
                      " at the same time instead of receiving; where each rank performs one transfer at a time, both "
                      "would wait for each other for ever");
      abort(message);
      throw CommError(rank(), operation, message);
    }
    sent.wait();
    return Pending(std::make_shared<Finished>(std::move(sent), Tensors()));
  }

  Pending receive(int peer, const std::optional<Expected>& expected) override {
    const Turn turn(busy_, "receive");
    Pending received = inner_->receive(peer, expected);
    Tensors tensors = received.take();
    inner_->send(peer, acknowledgement());
    return Pending(std::make_shared<Finished>(std::move(received), std::move(tensors)));
  }

  Pending all_reduce(Tensors tensors, Reduce reduce) override {
    const Turn turn(busy_, "all_reduce");
    return waited(inner_->all_reduce(std::move(tensors), reduce));
  }
  Pending broadcast(Tensors tensors, int root) override {
    const Turn turn(busy_, "broadcast");
    return waited(inner_->broadcast(std::move(tensors), root));
  }
  Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected) override {
    const Turn turn(busy_, "all_gather");
    return waited(inner_->all_gather(std::move(tensor), expected));
  }
  Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected) override {
    const Turn turn(busy_, "all_to_all");
    return waited(inner_->all_to_all(std::move(tensors), expected));
  }
  Pending barrier() override {
    const Turn turn(busy_, "barrier");
    return waited(inner_->barrier());
  }
  std::vector<std::string> commit(std::string ballot) override {
    const Turn turn(busy_, "commit");
    return inner_->commit(std::move(ballot));
  }
  std::shared_ptr<Communicator> split(int color, int key) override {
    const Turn turn(busy_, "split");
    auto part = inner_->split(color, key);
    return part == nullptr ? nullptr : serial(std::move(part));
  }

 private:
  /// One operation at a time: refuses a second thread, which the contract forbids.
  class Turn {
   public:
    Turn(std::atomic<bool>& busy, const char* operation) : busy_(busy) {
      DUALPIPE_CHECK(!busy_.exchange(true), operation,
                     " while this rank performs another operation; a communicator is used by one thread");
    }
    ~Turn() { busy_ = false; }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    std::atomic<bool>& busy_;
  };

  static Pending waited(Pending pending) {
    pending.wait();
    return pending;
  }

  std::atomic<bool> busy_{false};
};

// ---- delayed links

std::int64_t bytes(const Tensors& tensors) {
  std::int64_t sum = 0;
  for (const at::Tensor& tensor : tensors) sum += tensor.defined() ? static_cast<std::int64_t>(tensor.nbytes()) : 0;
  return sum;
}

/// Bytes that cross the busiest edge into this rank; -1: none, no delay.
using BusiestEdge = std::function<std::int64_t(const Tensors& result)>;

/// A message that may have arrived in `inner`, but not here.
struct Arrival {
  Pending inner;
  bool carries_time = false;  ///< the last tensor is the time of the send
  BusiestEdge busiest;
  bool timed = false;
  Clock::time_point due{};
  Tensors tensors;
};

/// The messages of one edge, which they occupy one after the other, in the order of the sends.
class EdgeQueue {
 public:
  explicit EdgeQueue(const Link& link) : link_(link) {}

  std::shared_ptr<Arrival> add(Pending inner, bool carries_time, BusiestEdge busiest) {
    auto arrival = std::make_shared<Arrival>();
    arrival->inner = std::move(inner);
    arrival->carries_time = carries_time;
    arrival->busiest = std::move(busiest);
    waiting_.push_back(arrival);
    return arrival;
  }

  /// Computes when `arrival` and all earlier ones are due. Without `block` stops at the first that has not arrived in
  /// `inner`.
  void time(const Arrival& arrival, bool block) {
    while (!arrival.timed) {
      const auto next = waiting_.front();
      if (!block && !next->inner.done()) return;
      set_due(*next);
      waiting_.pop_front();
    }
  }

 private:
  void set_due(Arrival& arrival) {
    arrival.tensors = arrival.inner.take();
    const Span span = arrival.inner.span();
    auto issued =
        Clock::time_point(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(span.begin)));
    if (arrival.carries_time) {
      issued = Clock::time_point(std::chrono::nanoseconds(arrival.tensors.back().item<std::int64_t>()));
      arrival.tensors.pop_back();
    }
    const std::int64_t size = arrival.busiest(arrival.tensors);
    if (size >= 0) {
      const double transmission = link_.bytes_per_second > 0 ? static_cast<double>(size) / link_.bytes_per_second : 0;
      free_ = std::max(free_, issued) +
              std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(transmission));
      arrival.due = free_ + std::chrono::duration_cast<Clock::duration>(link_.latency);
    }
    arrival.timed = true;
  }

  Link link_;
  Clock::time_point free_{};
  std::deque<std::shared_ptr<Arrival>> waiting_;
};

class Delayed final : public Pending::State {
 public:
  Delayed(std::shared_ptr<EdgeQueue> queue, std::shared_ptr<Arrival> arrival)
      : queue_(std::move(queue)), arrival_(std::move(arrival)) {}

  void wait() override {
    queue_->time(*arrival_, /*block=*/true);
    // Sleeps in slices: an abort ends the wait.
    constexpr auto slice = std::chrono::milliseconds(10);
    arrival_->inner.wait();
    for (auto now = Clock::now(); now < arrival_->due; now = Clock::now()) {
      std::this_thread::sleep_until(std::min(arrival_->due, now + slice));
      arrival_->inner.wait();
    }
  }
  bool done() const override {
    try {
      queue_->time(*arrival_, /*block=*/false);
      if (arrival_->timed) arrival_->inner.wait();  // complete in `inner`; notices an abort
    } catch (const CommError&) {
      return true;  // wait() throws it again
    }
    return arrival_->timed && Clock::now() >= arrival_->due;
  }
  Tensors take() override {
    wait();
    DUALPIPE_CHECK(!std::exchange(taken_, true), "the tensors of this operation were taken before");
    return std::move(arrival_->tensors);
  }
  Span span() const override {
    Span span = arrival_->inner.span();
    span.end = std::max(span.end, seconds(arrival_->due));
    return span;
  }

 private:
  std::shared_ptr<EdgeQueue> queue_;
  std::shared_ptr<Arrival> arrival_;
  bool taken_ = false;
};

class DelayedLinks final : public Wrapper {
 public:
  DelayedLinks(std::shared_ptr<Communicator> inner, const Link& link)
      : Wrapper(std::move(inner)), link_(link), collectives_(std::make_shared<EdgeQueue>(link)) {
    DUALPIPE_CHECK(link.latency.count() >= 0 && std::isfinite(link.bytes_per_second) && link.bytes_per_second >= 0,
                   "a link needs a latency and a bandwidth of zero or more, got ", link.latency.count(), " ns and ",
                   link.bytes_per_second, " bytes per second");
    for (int r = 0; r < size(); ++r) edges_.push_back(std::make_shared<EdgeQueue>(link));
  }

  Pending send(int peer, Tensors tensors) override {
    tensors.push_back(at::scalar_tensor(issue_time(), at::kLong));
    return inner_->send(peer, std::move(tensors));
  }
  Pending receive(int peer, const std::optional<Expected>& expected) override {
    std::optional<Expected> with_time = expected;
    if (with_time) with_time->signature.push_back({.dtype = at::kLong, .sizes = {}});
    Pending inner = inner_->receive(peer, with_time);
    return delayed(edges_[peer], std::move(inner), true, bytes);
  }
  Pending all_reduce(Tensors tensors, Reduce reduce) override {
    return collective(inner_->all_reduce(std::move(tensors), reduce), bytes);
  }
  Pending broadcast(Tensors tensors, int root) override {
    return collective(inner_->broadcast(std::move(tensors), root),
                      [is_root = root == rank()](const Tensors& result) { return is_root ? -1 : bytes(result); });
  }
  Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected) override {
    return collective(inner_->all_gather(std::move(tensor), expected), largest_of_others());
  }
  Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected) override {
    return collective(inner_->all_to_all(std::move(tensors), expected), largest_of_others());
  }
  Pending barrier() override { return collective(inner_->barrier(), bytes); }
  std::vector<std::string> commit(std::string ballot) override {
    auto ballots = inner_->commit(std::move(ballot));
    if (size() > 1) std::this_thread::sleep_for(link_.latency);
    return ballots;
  }
  std::shared_ptr<Communicator> split(int color, int key) override {
    auto part = inner_->split(color, key);
    return part == nullptr ? nullptr : delayed_links(std::move(part), link_);
  }

 private:
  static std::int64_t issue_time() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
  }
  static Pending delayed(const std::shared_ptr<EdgeQueue>& queue, Pending inner, bool carries_time,
                         BusiestEdge busiest) {
    return Pending(std::make_shared<Delayed>(queue, queue->add(std::move(inner), carries_time, std::move(busiest))));
  }
  Pending collective(Pending inner, BusiestEdge busiest) {
    if (size() == 1) return inner;
    return delayed(collectives_, std::move(inner), false, std::move(busiest));
  }
  BusiestEdge largest_of_others() const {
    return [me = rank()](const Tensors& result) {
      std::int64_t largest = 0;
      for (std::size_t r = 0; r < result.size(); ++r) {
        if (static_cast<int>(r) != me) largest = std::max(largest, bytes({result[r]}));
      }
      return largest;
    };
  }

  Link link_;
  std::vector<std::shared_ptr<EdgeQueue>> edges_;  // from each rank
  std::shared_ptr<EdgeQueue> collectives_;
};

}  // namespace

std::shared_ptr<Communicator> serial(std::shared_ptr<Communicator> inner) {
  DUALPIPE_CHECK(inner != nullptr, "serial: needs a communicator to wrap, got null");
  return std::make_shared<Serial>(std::move(inner));
}

std::shared_ptr<Communicator> delayed_links(std::shared_ptr<Communicator> inner, const Link& link) {
  DUALPIPE_CHECK(inner != nullptr, "delayed_links: needs a communicator to wrap, got null");
  return std::make_shared<DelayedLinks>(std::move(inner), link);
}

}  // namespace dualpipe::testing
