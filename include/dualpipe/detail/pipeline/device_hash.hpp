#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <optional>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/pipeline/batch.hpp"

namespace dualpipe::detail {

/// A hash of a tensor's bytes, computed where they are: int64 [1] on the same device. Costs twice the tensor's memory for
/// a moment.
inline at::Tensor device_hash(const at::Tensor& tensor) {
  at::Tensor bytes = tensor.detach().contiguous().flatten().view(at::kByte);
  constexpr std::int64_t word_size = sizeof(std::int64_t);
  const std::int64_t rest = bytes.numel() % word_size;
  if (rest != 0) bytes = at::constant_pad_nd(bytes, {0, word_size - rest});
  if (bytes.storage_offset() % word_size != 0) bytes = bytes.clone();
  const at::Tensor words = bytes.view(at::kLong);
  // Each word has a weight of its own, so that another order is another hash; odd weights lose no bit. Sums wrap around.
  constexpr std::int64_t factor = 0x1E3779B97F4A7C15;
  at::Tensor weights = at::arange(words.numel(), words.options()).mul_(2).add_(1).mul_(factor);
  weights.bitwise_xor_(weights.bitwise_right_shift(29)).bitwise_or_(1);
  return (words * weights).sum().reshape({1});
}

/// Of the values of a batch's members that lie on a device: inputs, targets, extras. None: no tensor of it does.
using MemberHashes = std::array<std::optional<std::uint64_t>, 3>;

/// Hashes that a device computes meanwhile.
class DeviceHashes {
 public:
  DeviceHashes() = default;
  /// Queues the work on the current stream.
  DeviceHashes(Communicator& communicator, const Batch& batch) {
    const at::NoGradGuard no_grad;
    constexpr std::array<Tensors Batch::*, 3> members = {&Batch::inputs, &Batch::targets, &Batch::extras};
    for (std::size_t i = 0; i < members.size(); ++i) add(batch, members[i], on_host_[i]);
    bool any = false;
    for (at::Tensor& hash : on_host_) {
      if (!hash.defined()) continue;
      hash = hash.to(at::kCPU, /*non_blocking=*/true);
      any = true;
    }
    if (any) ready_ = communicator.fence();
  }
  /// Waits for the device.
  MemberHashes values() {
    if (ready_) ready_.synchronize();
    MemberHashes values;
    for (std::size_t i = 0; i < values.size(); ++i)
      if (on_host_[i].defined()) values[i] = static_cast<std::uint64_t>(on_host_[i].const_data_ptr<std::int64_t>()[0]);
    return values;
  }

 private:
  static void add(const Batch& batch, Tensors Batch::* member, at::Tensor& hash) {
    for (const at::Tensor& tensor : batch.*member) {
      if (!tensor.defined() || tensor.is_cpu()) continue;
      const at::Tensor mine = device_hash(tensor);
      hash = hash.defined() ? hash * 31 + mine : mine;
    }
    for (const Batch& micro_batch : batch.micro_batches) add(micro_batch, member, hash);
  }

  std::array<at::Tensor, 3> on_host_;
  Pending ready_;
};

}  // namespace dualpipe::detail
