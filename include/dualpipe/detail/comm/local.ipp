#pragma once

#include "dualpipe/comm/local.hpp"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "dualpipe/detail/comm/message_communicator.hpp"
#include "dualpipe/detail/comm/shared_values.hpp"
#include "dualpipe/detail/comm/stopwatch.hpp"
#include "dualpipe/detail/error_text.hpp"

namespace dualpipe {
namespace detail {

/// The steps of ranks that are threads: one record for all, so that a step is over for all of its group or for none.
class LocalSteps {
 public:
  /// Counts the vote. @return the step
  std::uint64_t vote(std::int64_t number, const std::vector<int>& members, int rank, std::string ballot) {
    const std::lock_guard lock(mutex_);
    Group& group = group_of(number, members);
    const std::uint64_t step = group.steps + 1;
    group.ballots[rank] = std::move(ballot);
    if (failed_ || group.ballots.size() < members.size()) return step;
    group.last.clear();
    for (const int member : members) group.last.push_back(std::move(group.ballots[member]));
    group.ballots.clear();
    group.steps = step;
    changed_.notify_all();
    return step;
  }
  /// Returns when the step is no longer open, when a rank that has not voted has left, or at `limit` on `watch`.
  StepEnd wait(std::int64_t number, const std::vector<int>& members, std::uint64_t step, Stopwatch& watch,
               Stopwatch::Clock::duration limit) {
    std::unique_lock lock(mutex_);
    const Group& group = group_of(number, members);
    StepEnd end;
    watch.wait(changed_, lock, limit, [&] {
      end = end_of(group, members, step);
      return end.outcome != StepOutcome::open || end.has_left;
    });
    return end;
  }
  /// Ranks that have not voted.
  std::vector<int> missing(std::int64_t number, const std::vector<int>& members, std::uint64_t step) {
    const std::lock_guard lock(mutex_);
    return end_of(group_of(number, members), members, step).missing;
  }
  void fail() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    changed_.notify_all();
  }
  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    left_.insert(rank);
    changed_.notify_all();
  }

 private:
  struct Group {
    std::uint64_t steps = 0;             ///< that are over
    std::map<int, std::string> ballots;  ///< of the next one, by rank
    std::vector<std::string> last;       ///< of the last one
  };

  Group& group_of(std::int64_t number, const std::vector<int>& members) {
    return groups_[{number, *std::min_element(members.begin(), members.end())}];
  }
  StepEnd end_of(const Group& group, const std::vector<int>& members, std::uint64_t step) const {
    if (group.steps >= step) return {.outcome = StepOutcome::over, .ballots = group.last, .missing = {}};
    if (failed_) return {.outcome = StepOutcome::rolled_back, .ballots = {}, .missing = {}};
    std::vector<int> missing;
    for (const int member : members)
      if (!group.ballots.contains(member)) missing.push_back(member);
    return open_step(std::move(missing), left_);
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  /// Groups of one number have no rank in common.
  std::map<std::pair<std::int64_t, int>, Group> groups_;  // by number and lowest rank
  std::set<int> left_;
  bool failed_ = false;
};

/// Ranks that are threads of one process: a message goes straight into its receiver's queue, its tensors stay where
/// they are.
class LocalTransport final : public Transport, public std::enable_shared_from_this<LocalTransport> {
 public:
  using Ranks = std::vector<std::weak_ptr<LocalTransport>>;

  LocalTransport(int rank, int size, std::chrono::milliseconds timeout, at::Device device)
      : Transport(rank, size, timeout, /*epoch=*/0, device) {}
  ~LocalTransport() override {
    if (has_failed() || ranks_ == nullptr) return;
    for_others([this](LocalTransport& other) { other.departed(rank(), is_unwound()); });
    steps_->leave(rank());
  }
  /// Once, before any thread uses one of the `ranks`.
  void join(std::shared_ptr<const Ranks> ranks, std::shared_ptr<LocalSteps> steps,
            std::shared_ptr<SharedValues> values) {
    ranks_ = std::move(ranks);
    steps_ = std::move(steps);
    values_ = std::move(values);
  }
  SharedValues* shared_values() noexcept override { return values_.get(); }

 private:
  void start(int to, Message message, std::shared_ptr<Request> request) override {
    message.accepted = [sender = weak_from_this(), request = std::move(request)] {
      if (const auto transport = sender.lock()) transport->complete(request);
    };
    if (const auto receiver = (*ranks_)[to].lock()) receiver->deliver(rank(), std::move(message));
  }

  void spread(int origin, const std::string& reason) noexcept override {
    for_others([&](LocalTransport& other) { other.failed(origin, reason); });
    steps_->fail();  // afterwards: who learns it there knows the reason
  }

  std::uint64_t vote(std::int64_t group, const std::vector<int>& members, std::string ballot) override {
    return steps_->vote(group, members, rank(), std::move(ballot));
  }
  StepEnd wait_for_step(std::int64_t group, const std::vector<int>& members, std::uint64_t step, Stopwatch& watch,
                        Clock::duration limit) override {
    return steps_->wait(group, members, step, watch, limit);
  }

  std::vector<int> missing_votes(std::int64_t group, const std::vector<int>& members,
                                 std::uint64_t step) const override {
    return steps_->missing(group, members, step);
  }
  std::optional<RankActivity> ask(int rank) override {
    const auto other = (*ranks_)[rank].lock();
    return other == nullptr ? std::nullopt : std::optional(other->activity());
  }

  template <class Action>
  void for_others(const Action& action) const {
    for (const auto& weak : *ranks_) {
      const auto other = weak.lock();
      if (other != nullptr && other.get() != this) action(*other);
    }
  }

  std::shared_ptr<const Ranks> ranks_;
  std::shared_ptr<LocalSteps> steps_;
  std::shared_ptr<SharedValues> values_;
};

/// What ended a rank.
struct RankFailure {
  int rank = 0;
  std::exception_ptr error;
  std::optional<int> blamed;  ///< for a CommError: the rank where it began

  static RankFailure current(int rank) {
    try {
      throw;
    } catch (const CommError& error) {
      return {rank, std::current_exception(), error.origin_rank()};
    } catch (...) {
      return {rank, std::current_exception(), std::nullopt};
    }
  }
  std::string reason() const {
    try {
      std::rethrow_exception(error);
    } catch (...) {
      return current_error_text();
    }
  }
};

/// `failures` in the order in which they came, not empty.
inline const RankFailure& first_cause(const std::vector<RankFailure>& failures) {
  const RankFailure& first = failures.front();
  if (!first.blamed) return first;
  // A rank that failed by itself may be overtaken by ranks that its abort reached.
  for (const RankFailure& failure : failures) {
    if (failure.rank == *first.blamed && !failure.blamed) return failure;
  }
  return first;
}

/// Adds the index of the current device where `device` has none.
inline at::Device indexed_device(at::Device device) {
  if (device.is_cpu()) return device;
  DUALPIPE_CHECK(c10::impl::hasDeviceGuardImpl(device.type()), "ranks on ", device,
                 ": LibTorch's library for such devices is not loaded; for CUDA link the program with dualpipe::nccl");
  const c10::impl::VirtualGuardImpl devices(device.type());
  const int count = devices.deviceCount();
  DUALPIPE_CHECK(device.index() < count, "ranks on ", device, ": there ", count == 1 ? "is " : "are ", count,
                 " of these devices");
  DUALPIPE_CHECK(count > 0, "ranks on ", device, ": there is no such device");
  return device.has_index() ? device : devices.getDevice();
}

}  // namespace detail

std::vector<std::shared_ptr<Communicator>> local_communicators(int num_ranks, const LocalOptions& options) {
  DUALPIPE_CHECK(num_ranks >= 1, "a communicator needs at least one rank, got ", num_ranks);
  const at::Device device = detail::indexed_device(options.device);
  std::vector<std::shared_ptr<detail::LocalTransport>> transports;
  for (int r = 0; r < num_ranks; ++r)
    transports.push_back(std::make_shared<detail::LocalTransport>(r, num_ranks, options.timeout, device));
  const auto ranks = std::make_shared<const detail::LocalTransport::Ranks>(transports.begin(), transports.end());
  const auto steps = std::make_shared<detail::LocalSteps>();
  const auto values = std::make_shared<detail::SharedValues>();
  std::vector<std::shared_ptr<Communicator>> communicators;
  for (auto& transport : transports) {
    transport->join(ranks, steps, values);
    communicators.push_back(detail::MessageCommunicator::world(std::move(transport)));
  }
  return communicators;
}

void run_ranks(int num_ranks, const std::function<void(std::shared_ptr<Communicator>)>& body,
               const LocalOptions& options) {
  auto communicators = local_communicators(num_ranks, options);
  const at::Device device = communicators.front()->device();
  std::mutex mutex;
  std::vector<detail::RankFailure> failures;
  const auto run = [&](int rank, std::shared_ptr<Communicator> communicator) {
#ifdef __linux__
    pthread_setname_np(pthread_self(), detail::str("rank ", rank).c_str());
#endif
    try {
      const c10::DeviceGuard guard(device);
      body(communicator);
    } catch (...) {
      const detail::RankFailure failure = detail::RankFailure::current(rank);
      {
        const std::lock_guard lock(mutex);
        failures.push_back(failure);
      }
      communicator->abort(failure.reason());
    }
  };
  {
    std::vector<std::jthread> threads;
    try {
      for (int r = 0; r < num_ranks; ++r) {
        threads.emplace_back(run, r, communicators[r]);
        communicators[r].reset();
      }
    } catch (const std::exception& error) {  // the others wait for ranks that never start
      const std::string reason =
          detail::str("run_ranks cannot start a thread for rank ", threads.size(), " of ", num_ranks, ": ",
                      error.what(), "; the limits of this process on threads (ulimit -u) and memory (ulimit -v) count");
      communicators[threads.size()]->abort(reason);
      throw Error(reason);
    }
  }
  if (!failures.empty()) std::rethrow_exception(detail::first_cause(failures).error);
}

}  // namespace dualpipe
