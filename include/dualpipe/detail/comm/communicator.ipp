#pragma once

#include "dualpipe/comm/communicator.hpp"

#include <algorithm>
#include <cctype>

namespace dualpipe {
namespace detail {

/// As PyTorch prints it.
inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kByte:
      return "uint8";
    case at::kChar:
      return "int8";
    case at::kShort:
      return "int16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    case at::kHalf:
      return "float16";
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kComplexHalf:
      return "complex32";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    default:
      break;
  }
  std::string name = c10::toString(dtype);
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name;
}

}  // namespace detail

Signature signature_of(const Tensors& tensors) {
  Signature signature;
  signature.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (tensor.defined()) {
      signature.push_back(
          {.requires_grad = tensor.requires_grad(), .dtype = tensor.scalar_type(), .sizes = tensor.sizes().vec()});
    } else {
      signature.push_back({.defined = false, .sizes = {}});
    }
  }
  return signature;
}

std::string to_string(const Signature& signature) {
  std::string text = "[";
  for (const TensorSignature& tensor : signature) {
    if (text.size() > 1) text += ", ";
    if (!tensor.defined) {
      text += "undefined";
      continue;
    }
    text += detail::dtype_name(tensor.dtype) + " [";
    for (std::size_t i = 0; i < tensor.sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(tensor.sizes[i]);
    text += tensor.requires_grad ? "] requires_grad" : "]";
  }
  return text + "]";
}

}  // namespace dualpipe
