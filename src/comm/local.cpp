#include "dualpipe/comm/local.hpp"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pthread.h>

#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "dualpipe/detail/comm/message_communicator.hpp"

namespace dualpipe {
namespace {

/// Ranks that are threads of one process: a message is put where its receiver looks, its tensors stay where they are.
class LocalTransport final : public detail::Transport, public std::enable_shared_from_this<LocalTransport> {
 public:
  using Ranks = std::vector<std::weak_ptr<LocalTransport>>;

  LocalTransport(int rank, int size, std::chrono::milliseconds timeout, at::Device device)
      : Transport(rank, size, timeout, /*epoch=*/0, device) {}
  ~LocalTransport() override {
    if (!has_failed()) for_others([this](LocalTransport& other) { other.departed(rank()); });
  }
  /// `ranks` of all; before any thread uses one of them.
  void join(std::shared_ptr<const Ranks> ranks) { ranks_ = std::move(ranks); }

 private:
  void start(int to, detail::Message message, std::shared_ptr<detail::Request> transfer) override {
    message.accepted = [sender = weak_from_this(), transfer = std::move(transfer)] {
      if (const auto transport = sender.lock()) transport->complete(transfer);
    };
    if (const auto receiver = (*ranks_)[static_cast<std::size_t>(to)].lock())
      receiver->deliver(rank(), std::move(message));
  }

  void spread(int origin, const std::string& reason) noexcept override {
    for_others([&](LocalTransport& other) { other.failed(origin, reason); });
  }

  template <class Action>
  void for_others(const Action& action) const {
    if (ranks_ == nullptr) return;
    for (const auto& weak : *ranks_) {
      const auto other = weak.lock();
      if (other != nullptr && other.get() != this) action(*other);
    }
  }

  std::shared_ptr<const Ranks> ranks_;
};

/// What ended a rank.
struct Failure {
  int rank = 0;
  std::exception_ptr error;
  std::optional<int> blamed;  ///< for a CommError: the rank where it began

  static Failure current(int rank) {
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
    } catch (const std::exception& e) {
      return e.what();
    } catch (...) {
      return "an exception that is no std::exception";
    }
  }
};

/// `failures` in the order in which they came, not empty.
const Failure& first_cause(const std::vector<Failure>& failures) {
  const Failure& first = failures.front();
  if (!first.blamed) return first;
  // A rank that failed of itself may be overtaken by those whom its abort reached.
  for (const Failure& failure : failures) {
    if (failure.rank == *first.blamed && !failure.blamed) return failure;
  }
  return first;
}

/// With its index.
at::Device resolved(at::Device device) {
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

}  // namespace

std::vector<std::shared_ptr<Communicator>> local_communicators(int num_ranks, const LocalOptions& options) {
  DUALPIPE_CHECK(num_ranks >= 1, "a communicator needs at least one rank, got ", num_ranks);
  const at::Device device = resolved(options.device);
  std::vector<std::shared_ptr<LocalTransport>> transports;
  for (int r = 0; r < num_ranks; ++r)
    transports.push_back(std::make_shared<LocalTransport>(r, num_ranks, options.timeout, device));
  const auto ranks = std::make_shared<const LocalTransport::Ranks>(transports.begin(), transports.end());
  std::vector<std::shared_ptr<Communicator>> communicators;
  for (auto& transport : transports) {
    transport->join(ranks);
    communicators.push_back(detail::MessageCommunicator::world(std::move(transport)));
  }
  return communicators;
}

void run_ranks(int num_ranks, const std::function<void(std::shared_ptr<Communicator>)>& body,
               const LocalOptions& options) {
  auto communicators = local_communicators(num_ranks, options);
  const at::Device device = communicators.front()->device();
  std::mutex mutex;
  std::vector<Failure> failures;
  const auto run = [&](int rank, std::shared_ptr<Communicator> communicator) {
#ifdef __linux__
    pthread_setname_np(pthread_self(), detail::str("rank ", rank).c_str());
#endif
    try {
      const c10::DeviceGuard guard(device);
      body(communicator);
    } catch (...) {
      const Failure failure = Failure::current(rank);
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
        threads.emplace_back(run, r, std::move(communicators[static_cast<std::size_t>(r)]));
      }
    } catch (const std::exception& error) {  // no more threads: those that run wait for ranks that will never be
      for (const auto& communicator : communicators) {
        if (communicator != nullptr) communicator->abort(error.what());
      }
      throw;
    }
  }
  if (!failures.empty()) std::rethrow_exception(first_cause(failures).error);
}

}  // namespace dualpipe
