#pragma once

#include "dualpipe/train/master_weights.hpp"

#include <ATen/ATen.h>

#include <cstddef>
#include <unordered_set>
#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe {

MasterWeights::MasterWeights(Tensors parameters) : parameters_(std::move(parameters)) {
  std::unordered_set<at::TensorImpl*> seen;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& parameter = parameters_[i];
    DUALPIPE_CHECK(parameter.defined() && parameter.is_leaf() && seen.insert(parameter.unsafeGetTensorImpl()).second,
                   "MasterWeights takes each parameter of a module once, but tensor ", i, " of them ",
                   !parameter.defined()   ? "is undefined"
                   : !parameter.is_leaf() ? "was computed"
                                          : "comes twice");
    const bool low = parameter.scalar_type() == at::kBFloat16 || parameter.scalar_type() == at::kHalf;
    masters_.push_back(low ? parameter.detach().to(at::kFloat).requires_grad_(parameter.requires_grad()) : parameter);
  }
}

void MasterWeights::take_gradients() {
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < masters_.size(); ++i) {
    if (masters_[i].is_same(parameters_[i])) continue;
    const at::Tensor& gradient = parameters_[i].grad();
    masters_[i].mutable_grad() = gradient.defined() ? gradient.to(at::kFloat) : gradient;
  }
}

void MasterWeights::write_back() {
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < masters_.size(); ++i) {
    if (masters_[i].is_same(parameters_[i])) continue;
    parameters_[i].copy_(masters_[i]);
    masters_[i].mutable_grad().reset();
  }
}

void MasterWeights::take_values() {
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < masters_.size(); ++i)
    if (!masters_[i].is_same(parameters_[i])) masters_[i].copy_(parameters_[i]);
}

}  // namespace dualpipe
