#include "nccl/tensors.hpp"

#include <ATen/ATen.h>

namespace dualpipe::detail {
namespace {

void check_dense(const char* operation, const at::Tensor& tensor, std::size_t index, at::Device device) {
  DUALPIPE_CHECK(tensor.device() == device, operation, ": tensor ", index, " is on ", tensor.device(),
                 ", this communicator moves tensors of ", device, "; give it .to(communicator.device())");
  DUALPIPE_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(), operation,
                 ": tensor ", index, " has layout ", tensor.layout(), " and type ", tensor.toString(),
                 "; only dense tensors travel: use to_dense() or dequantize()");
}

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

Tensors send_buffers(const char* operation, const Tensors& tensors, at::Device device) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) check_dense(operation, tensors[i], i, device);
  const PlainTensors plain;
  Tensors result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      result.emplace_back();
    } else if (tensor.is_inference()) {
      result.push_back(tensor.resolve_conj().resolve_neg().clone(at::MemoryFormat::Contiguous));
    } else if (usable_directly(tensor)) {
      result.push_back(tensor.variable_data());
    } else {
      result.push_back(tensor.resolve_conj().resolve_neg().contiguous().variable_data());
    }
  }
  return result;
}

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
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) check_dense(operation, tensors[i], i, device);
  const PlainTensors plain;
  std::vector<InPlaceBuffer> result;
  for (const at::Tensor& tensor : tensors) result.emplace_back(tensor, as_bytes);
  return result;
}

Tensors memory_of(const std::vector<InPlaceBuffer>& places) {
  Tensors memory;
  for (const InPlaceBuffer& buffer : places) memory.push_back(buffer.memory());
  return memory;
}

Tensors allocate(DeviceApi& device, const Signature& signature, DeviceStream stream) {
  Tensors tensors;
  tensors.reserve(signature.size());
  for (const TensorSignature& tensor : signature)
    tensors.push_back(tensor.defined ? device.empty(tensor.sizes, tensor.dtype, stream) : at::Tensor());
  return tensors;
}

Tensors with_requires_grad(Tensors tensors, const Signature& signature) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) tensors[i].set_requires_grad(signature[i].requires_grad);
  return tensors;
}

}  // namespace dualpipe::detail
