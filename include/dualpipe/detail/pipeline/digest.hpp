#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <string_view>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe::detail {

/// A 64-bit hash of a sequence, for comparison between processes of one program.
class Digest {
 public:
  void add(std::uint64_t value) {
    // The step of splitmix64: each bit of the input changes half of the bits of the result.
    sum_ = (sum_ ^ value) + 0x9E3779B97F4A7C15ull;
    sum_ = (sum_ ^ (sum_ >> 30)) * 0xBF58476D1CE4E5B9ull;
    sum_ = (sum_ ^ (sum_ >> 27)) * 0x94D049BB133111EBull;
    sum_ ^= sum_ >> 31;
  }
  void add(std::string_view bytes) {
    add(static_cast<std::uint64_t>(bytes.size()));
    add(static_cast<std::uint64_t>(std::hash<std::string_view>{}(bytes)));
  }
  /// What a receiver learns of tensors beside their values: number, dtypes, sizes, requires_grad.
  void add_signatures(const Tensors& tensors) {
    add(static_cast<std::uint64_t>(tensors.size()));
    for (const at::Tensor& tensor : tensors) {
      add(std::uint64_t{tensor.defined() && tensor.requires_grad()});
      add_type(tensor);
    }
  }
  /// Number, dtypes, sizes and values of tensors; not the values of those on a device.
  void add_values(const Tensors& tensors) {
    add(static_cast<std::uint64_t>(tensors.size()));
    for (const at::Tensor& tensor : tensors) {
      add_type(tensor);
      if (!tensor.defined() || !tensor.is_cpu()) continue;
      const at::Tensor host = tensor.detach().contiguous();
      add(std::string_view(static_cast<const char*>(host.const_data_ptr()), host.nbytes()));
    }
  }
  std::uint64_t value() const { return sum_; }

 private:
  void add_type(const at::Tensor& tensor) {
    add(std::uint64_t{tensor.defined()});
    if (!tensor.defined()) return;
    add(static_cast<std::uint64_t>(tensor.scalar_type()));
    add(static_cast<std::uint64_t>(tensor.dim()));
    for (const std::int64_t size : tensor.sizes()) add(static_cast<std::uint64_t>(size));
  }

  std::uint64_t sum_ = 0;
};

}  // namespace dualpipe::detail
