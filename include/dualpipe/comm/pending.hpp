#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <utility>
#include <vector>

namespace dualpipe {

using Tensors = std::vector<at::Tensor>;

/// When an operation was under way, in seconds of std::chrono::steady_clock.
struct Span {
  double begin = 0;
  double end = 0;
};

/// A send, receive or collective under way. Keeps alive the tensors that it reads or writes. Copies refer to the same
/// operation. Used by the communicator's thread only. Dropping one neither blocks nor cancels the operation.
class Pending {
 public:
  class State {
   public:
    virtual ~State() = default;
    virtual void wait() = 0;
    virtual void synchronize() { wait(); }  ///< right where wait() blocks the thread
    virtual bool done() const = 0;
    virtual Tensors take() = 0;
    virtual Span span() const = 0;
  };
  Pending() = default;
  explicit Pending(std::shared_ptr<State> state) : state_(std::move(state)) {}

  /// As c10d's Work: on a device the current stream waits, on the CPU the calling thread.
  /// @throws CommError  a peer failed, the deadline passed, both ends disagree, or a sent tensor was written in place
  ///                    meanwhile.
  void wait() { state_->wait(); }
  /// wait(), then the calling thread waits until the device has completed the operation.
  /// @throws CommError  as wait(), also for a failure meanwhile.
  void synchronize() { state_->synchronize(); }
  /// Whether wait() would return or throw at once. Each call also advances the operation: polling alone completes it.
  bool done() const { return state_->done(); }
  /// Waits, then gives the received tensors, which nobody else holds, with the sender's requires_grad. Empty after a
  /// send. Once only: InvalidArgument afterwards.
  Tensors take() { return state_->take(); }
  /// From when both ends had called until completion, as far as this back end can tell. Valid once done().
  Span span() const { return state_->span(); }
  explicit operator bool() const noexcept { return state_ != nullptr; }

 private:
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe
