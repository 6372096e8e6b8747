#include "dualpipe/detail/comm/message_tensors.hpp"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <utility>

namespace dualpipe::detail {
namespace {

/// Whether nobody but `tensor` can reach its memory, and none of that memory is wasted. Memory without an allocator
/// (at::from_blob) belongs to somebody whom reference counts do not show.
bool exclusive(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  return storage.use_count() == 1 && storage.allocator() != nullptr && tensor.storage_offset() == 0 &&
         storage.nbytes() == tensor.nbytes();
}

void check_dense(const at::Tensor& tensor, std::size_t index, at::Device device) {
  DUALPIPE_CHECK(tensor.device() == device, "tensor ", index, " of the message is on ", tensor.device(),
                 ", this communicator moves tensors of ", device, "; give it .to(communicator.device())",
                 device.is_cpu() ? ", or use connect_nccl" : "");
  DUALPIPE_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(), "tensor ", index,
                 " of the message has layout ", tensor.layout(), " and type ", tensor.toString(),
                 "; only dense tensors travel: use to_dense() or dequantize()");
}

/// Without tensors there is nothing to order.
StreamOrder order_of(const Tensors& tensors, at::Device device) {
  const bool any = std::any_of(tensors.begin(), tensors.end(), [](const auto& tensor) { return tensor.defined(); });
  return any ? StreamOrder(device) : StreamOrder();
}

c10::Stream current_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

}  // namespace

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
  home_ = current_stream(device);
  last_.emplace(device.type());
  last_->record(*home_);
}

bool StreamOrder::at_home() const { return !home_ || current_stream(home_->device()) == *home_; }

void StreamOrder::enter() {
  if (home_) last_->block(current_stream(home_->device()));
}

void StreamOrder::leave() {
  if (!home_) return;
  last_->record(current_stream(home_->device()));
  last_->block(*home_);
}

std::shared_ptr<MessageTensors> MessageTensors::of_fresh(Tensors tensors, at::Device device) {
  auto parcel = std::make_shared<MessageTensors>();
  parcel->order_ = order_of(tensors, device);
  parcel->tensors_ = std::move(tensors);
  return parcel;
}

std::shared_ptr<MessageTensors> MessageTensors::of(const Tensors& tensors, at::Device device) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].defined()) check_dense(tensors[i], i, device);
  }
  const PlainTensors plain;
  auto parcel = std::make_shared<MessageTensors>();
  parcel->tensors_.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      parcel->tensors_.emplace_back();
    } else if (tensor.is_inference()) {
      parcel->tensors_.push_back(tensor.resolve_conj().resolve_neg().clone(at::MemoryFormat::Contiguous));
    } else if (!tensor.is_conj() && !tensor.is_neg() && tensor.is_contiguous()) {
      parcel->tensors_.push_back(tensor.variable_data());  // nearly always; the general way costs four dispatches
    } else {
      parcel->tensors_.push_back(tensor.resolve_conj().resolve_neg().contiguous().variable_data());
    }
  }
  parcel->order_ = order_of(tensors, device);
  parcel->watch_ = Watch(tensors);
  return parcel;
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
  Tensors before;  // on a device, kept until the stream that their memory belongs to waits for the copies
  for (at::Tensor& tensor : tensors_) {
    if (!tensor.defined() || (at_home && exclusive(tensor))) continue;
    at::Tensor copy = tensor.clone(at::MemoryFormat::Contiguous);
    if (!tensor.is_cpu()) before.push_back(tensor);
    tensor = std::move(copy);
  }
  if (!before.empty()) {
    order_.leave();
    order_ = StreamOrder(before.front().device());
  }
  // From now on the sender may write.
  if (!written_) written_ = watch_.written();
  watch_ = Watch();
}

Tensors MessageTensors::take() {
  const std::lock_guard lock(mutex_);
  settle_locked();  // in one go: what is at home here now must not be settled for the sender in between
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
