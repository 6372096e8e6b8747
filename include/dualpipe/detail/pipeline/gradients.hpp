#pragma once

#include <utility>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe {

/// Moves the gradients of `parameters` aside while a step accumulates into fresh ones. Unless committed, the destructor
/// puts back exactly what was there: the same tensor objects with the same values.
class GradientTransaction {
 public:
  explicit GradientTransaction(Tensors parameters) : parameters_(std::move(parameters)) {
    for (at::Tensor& parameter : parameters_) {
      aside_.push_back(std::move(parameter.mutable_grad()));
      parameter.mutable_grad() = at::Tensor();
    }
  }
  ~GradientTransaction() {
    for (std::size_t i = 0; i < aside_.size(); ++i) parameters_[i].mutable_grad() = std::move(aside_[i]);
  }
  GradientTransaction(const GradientTransaction&) = delete;
  GradientTransaction& operator=(const GradientTransaction&) = delete;

  /// Adds the fresh gradients to those set aside, in the tensors that the caller knows.
  void commit() {
    at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < aside_.size(); ++i) {
      at::Tensor& fresh = parameters_[i].mutable_grad();
      if (!aside_[i].defined()) continue;
      if (fresh.defined()) aside_[i].add_(fresh);
      fresh = std::move(aside_[i]);
    }
    aside_.clear();
  }

 private:
  Tensors parameters_;
  Tensors aside_;
};

}  // namespace dualpipe
