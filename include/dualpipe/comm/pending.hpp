#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <utility>
#include <vector>

namespace dualpipe {

using Tensors = std::vector<at::Tensor>;

/// When a transfer was under way, in seconds of std::chrono::steady_clock.
struct Span {
  double begin = 0;
  double end = 0;
};

/// A communication under way. Keeps alive what the transfer still reads or writes. Copies refer to the same operation;
/// used by the communicator's thread only. Dropping an unfinished one neither blocks nor cancels it.
class Pending {
 public:
  class State {
   public:
    virtual ~State() = default;
    virtual void wait() = 0;
    virtual void synchronize() { wait(); }  ///< right where wait() holds up the host
    virtual bool done() const = 0;
    virtual Tensors take() = 0;
    virtual Span span() const = 0;
  };
  Pending() = default;
  explicit Pending(std::shared_ptr<State> state) : state_(std::move(state)) {}

  /// As c10d's Work: on CUDA the current stream waits, on the CPU the host.
  /// @throws CommError  a peer failed, the deadline passed, both ends disagree, or a sent tensor was written in place
  /// meanwhile.
  void wait() { state_->wait(); }
  /// wait(), and the host waits as well until the device is through with it.
  /// @throws CommError  as wait(), and of what has failed meanwhile.
  void synchronize() { state_->synchronize(); }
  /// Whether wait() would return at once (or throw at once). Asking brings the operation forward, so that polling alone
  /// ends it.
  bool done() const { return state_->done(); }
  /// Waits, then gives the received tensors, which nobody else holds; requires_grad is set as the sender's was. Once
  /// only; empty after a send.
  Tensors take() { return state_->take(); }
  /// From the moment both ends had come to it to its completion, as far as this back end can tell; valid once done().
  Span span() const { return state_->span(); }
  explicit operator bool() const noexcept { return state_ != nullptr; }

 private:
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe
