#pragma once

#include <memory>
#include <string>
#include <utility>

#include "nccl/api.hpp"

// Tables that pass everything on, for those that do one thing differently.
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

}  // namespace dualpipe::test
