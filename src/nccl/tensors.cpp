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

bool as_it_is(const at::Tensor& tensor) { return !tensor.is_conj() && !tensor.is_neg() && tensor.is_contiguous(); }

/// What NCCL adds up in place of `dtype`, which it does not know.
at::ScalarType added_up_as(at::ScalarType dtype) {
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

Tensors travelling(const char* operation, const Tensors& tensors, at::Device device) {
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
    } else if (as_it_is(tensor)) {
      result.push_back(tensor.variable_data());
    } else {
      result.push_back(tensor.resolve_conj().resolve_neg().contiguous().variable_data());
    }
  }
  return result;
}

Place::Place(at::Tensor tensor, bool as_bytes) : tensor_(std::move(tensor)) {
  if (!tensor_.defined()) return;
  const at::Tensor plain = tensor_.detach();
  const bool direct =
      as_it_is(plain) && (as_bytes || plain.is_complex() || added_up_as(plain.scalar_type()) == plain.scalar_type());
  copied_ = !direct;
  memory_ = direct                           ? plain
            : as_bytes || plain.is_complex() ? plain.resolve_conj().resolve_neg().contiguous()
                                             : plain.to(added_up_as(plain.scalar_type())).contiguous();
  if (!as_bytes && memory_.is_complex()) memory_ = at::view_as_real(memory_);
}

void Place::finish() {
  if (!tensor_.defined()) return;
  if (!copied_) {
    if (!tensor_.is_inference()) tensor_.unsafeGetTensorImpl()->bump_version();
  } else {
    tensor_.copy_(tensor_.is_complex() && !memory_.is_complex() ? at::view_as_complex(memory_) : memory_);
  }
}

std::vector<Place> places(const char* operation, const Tensors& tensors, at::Device device, bool as_bytes) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) check_dense(operation, tensors[i], i, device);
  const PlainTensors plain;
  std::vector<Place> result;
  for (const at::Tensor& tensor : tensors) result.emplace_back(tensor, as_bytes);
  return result;
}

Tensors memory_of(const std::vector<Place>& places) {
  Tensors memory;
  for (const Place& place : places) memory.push_back(place.memory());
  return memory;
}

Tensors allocate(DeviceApi& device, const Signature& signature, DeviceStream stream) {
  Tensors tensors;
  tensors.reserve(signature.size());
  for (const TensorSignature& tensor : signature)
    tensors.push_back(tensor.defined ? device.empty(tensor.sizes, tensor.dtype, stream) : at::Tensor());
  return tensors;
}

Tensors described(Tensors tensors, const Signature& signature) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) tensors[i].set_requires_grad(signature[i].requires_grad);
  return tensors;
}

}  // namespace dualpipe::detail
