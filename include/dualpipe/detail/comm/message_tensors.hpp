#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"

// What becomes of the tensors of a message between their sender and their receiver.
namespace dualpipe::detail {

/// What travels is outside autograd, and an ordinary tensor even where the caller is in inference mode.
struct PlainTensors {
  c10::InferenceMode inference{false};
  c10::NoGradGuard no_grad;
};

/// Remembers the versions of tensors without holding their memory.
class Watch {
 public:
  Watch() = default;
  explicit Watch(const Tensors& tensors);
  /// What was written in place since, or nothing.
  std::optional<std::string> written() const;

 private:
  std::vector<std::pair<c10::VariableVersion, std::uint32_t>> versions_;
};

/// Orders work on the streams of a device across threads: what happens to some memory on the stream that it belongs to,
/// to which alone its allocator gives it back, and what others do with it on theirs. All calls mean the stream that is
/// current for the calling thread. Nothing at all on the CPU. Not thread-safe.
class StreamOrder {
 public:
  StreamOrder() = default;
  /// The memory belongs to the current stream of `device`, whose work so far made what is in it.
  explicit StreamOrder(at::Device device);

  /// Whether the memory belongs to the current stream.
  bool at_home() const;
  /// The current stream waits for all that was done before.
  void enter();
  /// All that is done later waits for the current stream, on the stream that the memory belongs to as well: afterwards
  /// the memory may be given back.
  void leave();
  bool done() const { return !last_ || last_->query(); }
  /// The host waits for all that was done before.
  void synchronize() const {
    if (last_) last_->synchronize();
  }

 private:
  std::optional<c10::Stream> home_;
  std::optional<c10::Event> last_;
};

/// The tensors of one message, contiguous, outside autograd, and with version counters of their own. While the sender's
/// user still holds one of them, both share its memory; settle() ends that. Where sender and receiver live in one
/// process, both refer to one parcel. Thread-safe.
///
/// On a device, memory changes hands only between threads with one current stream: an allocator gives memory back to
/// the stream that it was allocated on, whatever another one still does with it. Between streams it is copied.
class MessageTensors {
 public:
  /// A back end that has copied bytes into fresh `tensors` wraps them so, for the receiver.
  static std::shared_ptr<MessageTensors> of_fresh(Tensors tensors, at::Device device = at::kCPU);
  /// For the sender: aliases of the tensors where possible, copies elsewhere. @throws InvalidArgument  not a dense
  /// tensor on `device`.
  static std::shared_ptr<MessageTensors> of(const Tensors& tensors, at::Device device = at::kCPU);

  /// For a back end that copies bytes out: contiguous tensors in host memory, or undefined ones. Not to be called after
  /// release().
  const Tensors& tensors() const noexcept { return tensors_; }
  /// Around what is done on a device with tensors() on the current stream.
  void enter();
  void leave();
  /// Copies what others still refer to, and on a device what belongs to another stream than the current one. Afterwards
  /// the sender may write to its tensors.
  void settle();
  /// settle(), then gives the tensors away.
  Tensors take();
  /// Drops the tensors, once their bytes are copied elsewhere.
  void release();
  /// What the sender's user wrote in place before settle(), or nothing.
  std::optional<std::string> written() const;

 private:
  void settle_locked();

  mutable std::mutex mutex_;
  Tensors tensors_;
  StreamOrder order_;
  Watch watch_;
  std::optional<std::string> written_;
};

}  // namespace dualpipe::detail
