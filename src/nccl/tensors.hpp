#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "dualpipe/detail/comm/message_communicator.hpp"
#include "nccl/api.hpp"

// What becomes of a caller's tensors before the device works on them, and afterwards.
namespace dualpipe::detail {

inline bool empty(const at::Tensor& tensor) { return !tensor.defined() || tensor.numel() == 0; }

/// Aliases of the tensors where possible, else copies made on the current stream; contiguous and outside autograd.
///
/// @throws InvalidArgument  not a dense tensor of `device`; `operation` names the call.
Tensors travelling(const char* operation, const Tensors& tensors, at::Device device);

/// Where an in-place collective works: the tensor's own memory where it can be used as it is, else a copy.
class Place {
 public:
  /// @param as_bytes  its dtype does not matter; otherwise NCCL must be able to add it up.
  Place(at::Tensor tensor, bool as_bytes);
  const at::Tensor& memory() const { return memory_; }
  /// On the stream that has waited.
  void finish();

 private:
  at::Tensor tensor_, memory_;
  bool copied_ = false;
};

/// @throws InvalidArgument  as travelling().
std::vector<Place> places(const char* operation, const Tensors& tensors, at::Device device, bool as_bytes);
Tensors memory_of(const std::vector<Place>& places);

/// Memory for what `signature` announces, for work on `stream`.
Tensors allocate(DeviceApi& device, const Signature& signature, DeviceStream stream);
/// Gives tensors as their sender described them.
Tensors described(Tensors tensors, const Signature& signature);

}  // namespace dualpipe::detail
