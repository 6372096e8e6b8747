#pragma once

#include <ATen/ATen.h>
#include <torch/nn/module.h>

#include <exception>
#include <unordered_map>
#include <utility>

#include "dualpipe/config.hpp"

namespace dualpipe::detail {

inline const char* name_of(BufferReduction reduction) {
  switch (reduction) {
    case BufferReduction::broadcast:
      return "broadcast";
    case BufferReduction::sum:
      return "sum";
    case BufferReduction::mean:
      return "mean";
    case BufferReduction::local:
      break;
  }
  return "local";
}

/// Remembers the values of a module's buffers. Unless committed, the destructor restores them.
class BufferTransaction {
 public:
  explicit BufferTransaction(const torch::nn::Module& module) {
    const at::NoGradGuard no_grad;
    for (const at::Tensor& buffer : module.buffers())
      if (buffer.defined() && !saved_.contains(buffer.unsafeGetTensorImpl()))
        saved_[buffer.unsafeGetTensorImpl()] = {buffer, buffer.detach().clone()};
  }
  ~BufferTransaction() {
    const at::NoGradGuard no_grad;
    for (auto& [key, saved] : saved_) {
      auto& [buffer, value] = saved;
      try {
        if (buffer.sizes() == value.sizes()) {
          buffer.copy_(value);
        } else {
          buffer.set_data(value);
        }
      } catch (const std::exception&) {
        // A device that has failed. The exception under way says so.
      }
    }
  }
  BufferTransaction(const BufferTransaction&) = delete;
  BufferTransaction& operator=(const BufferTransaction&) = delete;

  /// The remembered value of a buffer of the module.
  const at::Tensor& before(const at::Tensor& buffer) const { return saved_.at(buffer.unsafeGetTensorImpl()).second; }
  void commit() noexcept { saved_.clear(); }

 private:
  std::unordered_map<const at::TensorImpl*, std::pair<at::Tensor, at::Tensor>> saved_;
};

}  // namespace dualpipe::detail
