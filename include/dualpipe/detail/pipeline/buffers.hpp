#pragma once

#include <ATen/ATen.h>
#include <torch/nn/module.h>

#include <exception>
#include <unordered_set>
#include <utility>
#include <vector>

namespace dualpipe::detail {

/// Remembers the values of a module's buffers. Unless committed, the destructor restores them.
class BufferTransaction {
 public:
  explicit BufferTransaction(const torch::nn::Module& module) {
    const at::NoGradGuard no_grad;
    std::unordered_set<at::TensorImpl*> seen;
    for (const at::Tensor& buffer : module.buffers())
      if (buffer.defined() && seen.insert(buffer.unsafeGetTensorImpl()).second)
        saved_.emplace_back(buffer, buffer.detach().clone());
  }
  ~BufferTransaction() {
    const at::NoGradGuard no_grad;
    for (auto& [buffer, value] : saved_) {
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

  void commit() noexcept { saved_.clear(); }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> saved_;
};

}  // namespace dualpipe::detail
