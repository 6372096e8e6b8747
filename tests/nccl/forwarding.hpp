#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "nccl/api.hpp"

// DeviceApi and NcclApi that pass every call on, as bases of those that change one.
namespace dualpipe::test {

class ForwardingDevice : public detail::DeviceApi {
 public:
  explicit ForwardingDevice(std::shared_ptr<detail::DeviceApi> inner) : inner_(std::move(inner)) {}

  at::Device device() const override { return inner_->device(); }
  detail::DeviceStream current_stream() override { return inner_->current_stream(); }
  detail::DeviceStream create_stream() override { return inner_->create_stream(); }
  void destroy(detail::DeviceStream stream) noexcept override { inner_->destroy(stream); }
  detail::DeviceEvent create_event(bool timed) override { return inner_->create_event(timed); }
  void destroy(detail::DeviceEvent event) noexcept override { inner_->destroy(event); }
  void record(detail::DeviceEvent event, detail::DeviceStream stream) override { inner_->record(event, stream); }
  void wait(detail::DeviceStream stream, detail::DeviceEvent event) override { inner_->wait(stream, event); }
  bool done(detail::DeviceEvent event) override { return inner_->done(event); }
  double time_of(detail::DeviceEvent event) override { return inner_->time_of(event); }
  std::shared_ptr<detail::DeviceFlag[]> create_flags(std::size_t count) override { return inner_->create_flags(count); }
  void write_flag(detail::DeviceStream stream, detail::DeviceFlag& flag, std::uint32_t value) override {
    inner_->write_flag(stream, flag, value);
  }
  void wait_for_flag(detail::DeviceStream stream, const detail::DeviceFlag& flag, std::uint32_t value) override {
    inner_->wait_for_flag(stream, flag, value);
  }
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, detail::DeviceStream stream) override {
    return inner_->empty(sizes, dtype, stream);
  }
  void copy(const at::Tensor& to, const at::Tensor& from, detail::DeviceStream stream) override {
    inner_->copy(to, from, stream);
  }
  void push_range(const std::string& name) override { inner_->push_range(name); }
  void pop_range() override { inner_->pop_range(); }

 protected:
  const std::shared_ptr<detail::DeviceApi> inner_;
};

class ForwardingNccl : public detail::NcclApi {
 public:
  explicit ForwardingNccl(std::shared_ptr<detail::NcclApi> inner) : inner_(std::move(inner)) {}

  detail::NcclId unique_id() override { return inner_->unique_id(); }
  detail::NcclComm init(int ranks, const detail::NcclId& id, int rank, const detail::NcclConfig& config) override {
    return inner_->init(ranks, id, rank, config);
  }
  void destroy(detail::NcclComm comm) override { inner_->destroy(comm); }
  void abort(std::span<const detail::NcclComm> comms) noexcept override { inner_->abort(comms); }
  std::optional<std::string> async_error(detail::NcclComm comm) override { return inner_->async_error(comm); }
  void group_start() override { inner_->group_start(); }
  void group_end() override { inner_->group_end(); }
  void send(const void* data, std::size_t bytes, int peer, detail::NcclComm comm,
            detail::DeviceStream stream) override {
    inner_->send(data, bytes, peer, comm, stream);
  }
  void receive(void* data, std::size_t bytes, int peer, detail::NcclComm comm, detail::DeviceStream stream) override {
    inner_->receive(data, bytes, peer, comm, stream);
  }
  void broadcast(void* data, std::size_t bytes, int root, detail::NcclComm comm, detail::DeviceStream stream) override {
    inner_->broadcast(data, bytes, root, comm, stream);
  }
  void all_reduce(void* data, std::size_t count, at::ScalarType dtype, Reduce reduce, detail::NcclComm comm,
                  detail::DeviceStream stream) override {
    inner_->all_reduce(data, count, dtype, reduce, comm, stream);
  }

 protected:
  const std::shared_ptr<detail::NcclApi> inner_;
};

/// A point that all ranks must reach at the same time.
class Meeting {
 public:
  explicit Meeting(int num_ranks) : missing_(num_ranks) {}
  /// Returns when all ranks have arrived; gives up and counts as failed after a generous time.
  void arrive() {
    std::unique_lock lock(mutex_);
    --missing_;
    changed_.notify_all();
    changed_.wait_for(lock, std::chrono::seconds(40), [this] { return missing_ <= 0 || failed_; });
    failed_ = failed_ || missing_ > 0;
    changed_.notify_all();
  }
  bool failed() const {
    const std::lock_guard lock(mutex_);
    return failed_;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int missing_;
  bool failed_ = false;
};

/// Each rank's first init() of a two-rank communicator waits until every rank has called one.
class MeetingNccl final : public ForwardingNccl {
 public:
  MeetingNccl(std::shared_ptr<detail::NcclApi> inner, std::shared_ptr<Meeting> meeting)
      : ForwardingNccl(std::move(inner)), meeting_(std::move(meeting)) {}
  detail::NcclComm init(int ranks, const detail::NcclId& id, int rank, const detail::NcclConfig& config) override {
    if (ranks == 2 && !std::exchange(met_, true)) meeting_->arrive();
    return inner_->init(ranks, id, rank, config);
  }

 private:
  const std::shared_ptr<Meeting> meeting_;
  bool met_ = false;
};

/// A device whose streams ignore some waits.
class ForgetfulDevice final : public ForwardingDevice {
 public:
  enum class Forgets {
    to_wait_for_the_caller,   ///< a transfer does not wait for its producer or for earlier uses of its buffer
    to_wait_for_the_transfer  ///< the consumer does not wait for its data
  };
  ForgetfulDevice(std::shared_ptr<detail::DeviceApi> inner, Forgets forgets)
      : ForwardingDevice(std::move(inner)), forgets_(forgets) {}

  void wait(detail::DeviceStream stream, detail::DeviceEvent event) override {
    const bool by_caller = stream == inner_->current_stream();
    if (by_caller != (forgets_ == Forgets::to_wait_for_the_transfer)) inner_->wait(stream, event);
  }

 private:
  const Forgets forgets_;
};

}  // namespace dualpipe::test
