#include "nccl/tensors.hpp"

#include <ATen/ATen.h>

namespace dualpipe::detail {
namespace {

bool usable_directly(const at::Tensor& tensor) {
  return !tensor.is_conj() && !tensor.is_neg() && tensor.is_contiguous();
}

/// The dtype in which NCCL reduces tensors of `dtype`.
at::ScalarType reduction_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kByte:
    case at::kChar:
    case at::kInt:
    case at::kLong:
    case at::kHalf:
    case at::kBFloat16:
    case at::kFloat:
    case at::kDouble:
      return dtype;
    default:
      return at::isIntegralType(dtype, /*includeBool=*/true) ? at::kInt : at::kFloat;
  }
}

}  // namespace

InPlaceBuffer::InPlaceBuffer(at::Tensor tensor, bool as_bytes) : tensor_(std::move(tensor)) {
  if (!tensor_.defined()) return;
  const at::Tensor plain = tensor_.detach();
  const bool direct = usable_directly(plain) &&
                      (as_bytes || plain.is_complex() || reduction_dtype(plain.scalar_type()) == plain.scalar_type());
  copied_ = !direct;
  memory_ = direct                           ? plain
            : as_bytes || plain.is_complex() ? plain.resolve_conj().resolve_neg().contiguous()
                                             : plain.to(reduction_dtype(plain.scalar_type())).contiguous();
  if (!as_bytes && memory_.is_complex()) memory_ = at::view_as_real(memory_);
}

void InPlaceBuffer::finish() {
  if (!tensor_.defined()) return;
  if (!copied_) {
    if (!tensor_.is_inference()) tensor_.unsafeGetTensorImpl()->bump_version();
  } else {
    tensor_.copy_(tensor_.is_complex() && !memory_.is_complex() ? at::view_as_complex(memory_) : memory_);
  }
}

std::vector<InPlaceBuffer> in_place_buffers(const char* operation, const Tensors& tensors, at::Device device,
                                            bool as_bytes) {
  check_sendable(tensors, device, str(" of ", operation));
  const PlainTensors plain;
  std::vector<InPlaceBuffer> result;
  for (const at::Tensor& tensor : tensors) result.emplace_back(tensor, as_bytes);
  return result;
}

Tensors memory_of(const std::vector<InPlaceBuffer>& buffers) {
  Tensors memory;
  for (const InPlaceBuffer& buffer : buffers) memory.push_back(buffer.memory());
  return memory;
}

Tensors allocate(DeviceApi& device, const Signature& signature, DeviceStream stream) {
  Tensors tensors;
  tensors.reserve(signature.size());
  for (const TensorSignature& tensor : signature)
    tensors.push_back(tensor.defined ? device.empty(tensor.sizes, tensor.dtype, stream) : at::Tensor());
  return tensors;
}

}  // namespace dualpipe::detail
