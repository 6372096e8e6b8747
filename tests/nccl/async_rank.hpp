#pragma once

#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "emulated.hpp"
#include "forwarding.hpp"

namespace dualpipe::test {

/// A rank whose work goes to a stream of its own, which lags behind the host as a GPU does.
class AsyncRank {
 public:
  explicit AsyncRank(const EmulatedRank& rank) : rank_(rank), stream_(rank.device->create_stream()) {
    rank_.emulation.set_current(rank_.communicator->rank(), stream_);
  }
  ~AsyncRank() {
    rank_.emulation.synchronize(stream_);
    rank_.emulation.set_current(rank_.communicator->rank(), nullptr);
    rank_.device->destroy(stream_);
  }
  AsyncRank(const AsyncRank&) = delete;
  AsyncRank& operator=(const AsyncRank&) = delete;

  Communicator& operator*() const { return *rank_.communicator; }
  Communicator* operator->() const { return rank_.communicator.get(); }
  int rank() const { return rank_.communicator->rank(); }
  detail::DeviceStream stream() const { return stream_; }

  /// Memory for work on the stream.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) const {
    return rank_.device->empty(sizes, dtype, stream_);
  }
  /// What a kernel does. It must hold the tensors that it uses, as their memory is given back in the stream's order.
  void run(std::function<void()> kernel) const { rank_.emulation.run(stream_, std::move(kernel)); }
  void synchronize() const { rank_.emulation.synchronize(stream_); }

 private:
  EmulatedRank rank_;
  detail::DeviceStream stream_;
};

/// A kernel that takes its time and then writes behind autograd's back, as kernels do.
inline std::function<void()> slow_fill(at::Tensor tensor, const std::function<float(std::int64_t)>& value,
                                       std::chrono::microseconds duration) {
  return [tensor = std::move(tensor), value, duration] {
    std::this_thread::sleep_for(duration);
    float* data = tensor.mutable_data_ptr<float>();
    for (std::int64_t i = 0; i < tensor.numel(); ++i) data[i] = value(i);
  };
}

/// A device whose streams do not always wait when they are told to.
class ForgetfulDevice final : public ForwardingDevice {
 public:
  enum class Forgets {
    to_wait_for_the_caller,   ///< a transfer does not wait for its producer, or for who used its buffer before
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
