#pragma once

#include "dualpipe/detail/comm/message_tensors.hpp"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cstddef>
#include <utility>

namespace dualpipe::detail {

/// Whether nobody but `tensor` can reach its memory, and none of that memory is wasted. Memory without an allocator
/// (at::from_blob) has an owner whom reference counts do not show.
inline bool owns_memory_alone(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  return storage.use_count() == 1 && storage.allocator() != nullptr && tensor.storage_offset() == 0 &&
         storage.nbytes() == tensor.nbytes();
}

/// Without tensors there is nothing to order.
inline StreamOrder stream_order_of(const Tensors& tensors, at::Device device) {
  const bool any = std::any_of(tensors.begin(), tensors.end(), [](const auto& tensor) { return tensor.defined(); });
  return any ? StreamOrder(device) : StreamOrder();
}

inline c10::Stream current_stream_of(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

void check_sendable(const Tensors& tensors, at::Device device, const std::string& where) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (!tensor.defined()) continue;
    DUALPIPE_CHECK(tensor.device() == device, "tensor ", i, where, " is on ", tensor.device(),
                   ", this communicator moves tensors of ", device, "; give it .to(communicator.device())",
                   device.is_cpu() ? ", or use connect_nccl" : "");
    DUALPIPE_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(), "tensor ", i,
                   where, " has layout ", tensor.layout(), " and type ", tensor.toString(),
                   "; only dense tensors travel: use to_dense() or dequantize()");
  }
}

Tensors sendable(const Tensors& tensors) {
  const PlainTensors plain;
  Tensors result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      result.emplace_back();
    } else if (tensor.is_inference()) {
      result.push_back(tensor.resolve_conj().resolve_neg().clone(at::MemoryFormat::Contiguous));
    } else if (!tensor.is_conj() && !tensor.is_neg() && tensor.is_contiguous()) {
      result.push_back(tensor.variable_data());  // nearly always; the general way costs four dispatches
    } else {
      result.push_back(tensor.resolve_conj().resolve_neg().contiguous().variable_data());
    }
  }
  return result;
}

Tensors as_described(Tensors tensors, const Signature& signature) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) tensors[i].set_requires_grad(signature[i].requires_grad);
  return tensors;
}

Watch::Watch(const Tensors& tensors) {
  versions_.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    // Undefined and inference tensors have no version.
    const bool versioned = tensor.defined() && !tensor.is_inference();
    const c10::VariableVersion version =
        versioned ? tensor.unsafeGetTensorImpl()->version_counter() : c10::VariableVersion();
    versions_.emplace_back(version, version.enabled() ? version.current_version() : 0);
  }
}

std::optional<std::string> Watch::written() const {
  for (std::size_t i = 0; i < versions_.size(); ++i) {
    const auto& [version, before] = versions_[i];
    if (version.enabled() && version.current_version() != before) {
      return str("tensor ", i, " was written in place while it was under way (version ", before, ", now ",
                 version.current_version(), "); call wait() before writing to it, or give a clone()");
    }
  }
  return std::nullopt;
}

StreamOrder::StreamOrder(at::Device device) {
  if (device.is_cpu()) return;
  home_ = current_stream_of(device);
  last_.emplace(device.type());
  last_->record(*home_);
}

bool StreamOrder::at_home() const { return !home_ || current_stream_of(home_->device()) == *home_; }

void StreamOrder::enter() {
  if (home_) last_->block(current_stream_of(home_->device()));
}

void StreamOrder::leave() {
  if (!home_) return;
  last_->record(current_stream_of(home_->device()));
  last_->block(*home_);
}

std::shared_ptr<MessageTensors> MessageTensors::of_fresh(Tensors tensors, at::Device device) {
  auto result = std::make_shared<MessageTensors>();
  result->order_ = stream_order_of(tensors, device);
  result->tensors_ = std::move(tensors);
  return result;
}

std::shared_ptr<MessageTensors> MessageTensors::of(const Tensors& tensors, at::Device device) {
  check_sendable(tensors, device, " of the message");
  auto result = std::make_shared<MessageTensors>();
  result->tensors_ = sendable(tensors);
  result->order_ = stream_order_of(tensors, device);
  result->watch_ = Watch(tensors);
  return result;
}

void MessageTensors::enter() {
  const std::lock_guard lock(mutex_);
  order_.enter();
}

void MessageTensors::leave() {
  const std::lock_guard lock(mutex_);
  order_.leave();
}

void MessageTensors::settle() {
  const std::lock_guard lock(mutex_);
  settle_locked();
}

void MessageTensors::settle_locked() {
  const PlainTensors plain;
  order_.enter();
  const bool at_home = order_.at_home();
  Tensors before;  // on a device: kept until their home stream waits for the copies
  for (at::Tensor& tensor : tensors_) {
    if (!tensor.defined() || (at_home && owns_memory_alone(tensor))) continue;
    at::Tensor copy = tensor.clone(at::MemoryFormat::Contiguous);
    if (!tensor.is_cpu()) before.push_back(tensor);
    tensor = std::move(copy);
  }
  if (!before.empty()) {
    order_.leave();
    order_ = StreamOrder(before.front().device());
  }
  // The sender may write from now on.
  if (!written_) written_ = watch_.written();
  watch_ = Watch();
}

Tensors MessageTensors::take() {
  const std::lock_guard lock(mutex_);
  settle_locked();  // under one lock with the exchange: the sender must not settle on another stream in between
  return std::exchange(tensors_, {});
}

void MessageTensors::release() {
  const std::lock_guard lock(mutex_);
  tensors_.clear();
}

std::optional<std::string> MessageTensors::written() const {
  const std::lock_guard lock(mutex_);
  return written_;
}

}  // namespace dualpipe::detail
