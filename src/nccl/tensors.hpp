#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "dualpipe/detail/comm/message_communicator.hpp"
#include "nccl/api.hpp"

// Prepares a caller's tensors for NCCL, and restores them afterwards.
namespace dualpipe::detail {

inline bool has_elements(const at::Tensor& tensor) { return tensor.defined() && tensor.numel() > 0; }

/// The buffer of an in-place collective: the tensor's own memory if NCCL can use it, else a copy.
class InPlaceBuffer {
 public:
  /// @param as_bytes  any dtype is allowed; otherwise the buffer gets a dtype that NCCL reduces.
  InPlaceBuffer(at::Tensor tensor, bool as_bytes);
  const at::Tensor& memory() const { return memory_; }
  /// Writes a copied result back, on the current stream, which must have waited.
  void finish();

 private:
  at::Tensor tensor_, memory_;
  bool copied_ = false;
};

/// @throws InvalidArgument  as check_sendable(); `operation` names the call.
std::vector<InPlaceBuffer> in_place_buffers(const char* operation, const Tensors& tensors, at::Device device,
                                            bool as_bytes);
Tensors memory_of(const std::vector<InPlaceBuffer>& buffers);

/// Tensors of the given signature, for use on `stream`.
Tensors allocate(DeviceApi& device, const Signature& signature, DeviceStream stream);

}  // namespace dualpipe::detail
