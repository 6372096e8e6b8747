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
#include "dualpipe/detail/config.hpp"

// The tensors of a message, from their sender to their receiver.
namespace dualpipe::detail {

/// Makes tensors outside autograd, and ordinary ones even where the caller is in inference mode.
struct PlainTensors {
  c10::InferenceMode inference{false};
  c10::NoGradGuard no_grad;
};

/// @param where  completes "tensor 2", as in " of the message"; may be empty.
/// @throws InvalidArgument  a tensor that is not dense or not on `device`.
DUALPIPE_DECL void check_sendable(const Tensors& tensors, at::Device device, const std::string& where);
/// Aliases of the tensors where possible, else copies made on the current stream; contiguous, outside autograd, with
/// version counters of their own.
DUALPIPE_DECL Tensors sendable(const Tensors& tensors);
/// Sets requires_grad as the sender described its tensors.
DUALPIPE_DECL Tensors as_described(Tensors tensors, const Signature& signature);

/// Remembers the versions of tensors without holding their memory.
class Watch {
 public:
  Watch() = default;
  DUALPIPE_DECL explicit Watch(const Tensors& tensors);
  /// Says which tensor was written in place since; nullopt: none.
  DUALPIPE_DECL std::optional<std::string> written() const;

 private:
  std::vector<std::pair<c10::VariableVersion, std::uint32_t>> versions_;
};

/// Orders the work of several streams on one piece of memory. The memory belongs to its home stream: the allocator
/// gives it back to that stream alone. Each call acts on the calling thread's current stream. Does nothing on the CPU.
/// Not thread-safe.
class StreamOrder {
 public:
  StreamOrder() = default;
  /// Home is the current stream of `device`, whose work so far has filled the memory.
  DUALPIPE_DECL explicit StreamOrder(at::Device device);

  /// Whether the current stream is the home stream.
  DUALPIPE_DECL bool at_home() const;
  /// The current stream waits for all earlier work on the memory.
  DUALPIPE_DECL void enter();
  /// The home stream and all later work on the memory wait for the current stream. The memory may be freed afterwards.
  DUALPIPE_DECL void leave();
  bool done() const { return !last_ || last_->query(); }
  /// The calling thread waits for all earlier work on the memory.
  void synchronize() const {
    if (last_) last_->synchronize();
  }

 private:
  std::optional<c10::Stream> home_;
  std::optional<c10::Event> last_;
};

/// The tensors of one message: contiguous, outside autograd, with version counters of their own. They share memory with
/// tensors that the sender's caller still holds, until settle(). Where sender and receiver live in one process, both
/// refer to one object. Thread-safe.
///
/// On a device, memory changes hands only between threads with one current stream, since an allocator gives memory back
/// to the stream that it was allocated on, whatever another stream still does with it. Between streams it is copied.
class MessageTensors {
 public:
  /// For the receiver, by a back end that has copied bytes into fresh `tensors`.
  DUALPIPE_DECL static std::shared_ptr<MessageTensors> of_fresh(Tensors tensors, at::Device device = at::kCPU);
  /// For the sender: sendable(tensors). @throws InvalidArgument  as check_sendable().
  DUALPIPE_DECL static std::shared_ptr<MessageTensors> of(const Tensors& tensors, at::Device device = at::kCPU);

  /// For a back end that copies bytes out: contiguous tensors in CPU memory, or undefined ones. Not after release().
  const Tensors& tensors() const noexcept { return tensors_; }
  /// Before and after work on tensors() that the current stream of a device does.
  DUALPIPE_DECL void enter();
  DUALPIPE_DECL void leave();
  /// Copies tensors that others still refer to, and on a device those whose home is another stream than the current
  /// one. The sender may write to its own tensors afterwards.
  DUALPIPE_DECL void settle();
  /// settle(), then gives the tensors away.
  DUALPIPE_DECL Tensors take();
  /// Drops the tensors, once their bytes are copied elsewhere.
  DUALPIPE_DECL void release();
  /// Says which tensor the sender's caller wrote in place before settle(); nullopt: none.
  DUALPIPE_DECL std::optional<std::string> written() const;

 private:
  DUALPIPE_DECL void settle_locked();

  mutable std::mutex mutex_;
  Tensors tensors_;
  StreamOrder order_;
  Watch watch_;
  std::optional<std::string> written_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/comm/message_tensors.ipp"
#endif
