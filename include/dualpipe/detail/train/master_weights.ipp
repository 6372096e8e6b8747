#pragma once

#include "dualpipe/train/master_weights.hpp"

#include <ATen/ATen.h>
#include <torch/optim/optimizer.h>

#include <cstddef>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "dualpipe/detail/widened.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe {
namespace detail {

/// While it lives, an optimizer has other parameters in the places of its own, with the states that it keeps for them.
class ReplacedParameters {
 public:
  /// The i-th of `before` becomes the i-th of `after`.
  ReplacedParameters(torch::optim::Optimizer& optimizer, const Tensors& before, const Tensors& after)
      : optimizer_(optimizer) {
    std::unordered_map<at::TensorImpl*, at::Tensor> there;
    for (std::size_t i = 0; i < before.size(); ++i) {
      if (before[i].is_same(after[i])) continue;
      there[before[i].unsafeGetTensorImpl()] = after[i];
      back_[after[i].unsafeGetTensorImpl()] = before[i];
    }
    replace(there);
  }
  ~ReplacedParameters() { replace(back_); }
  ReplacedParameters(const ReplacedParameters&) = delete;
  ReplacedParameters& operator=(const ReplacedParameters&) = delete;

 private:
  void replace(const std::unordered_map<at::TensorImpl*, at::Tensor>& by) {
    auto& states = optimizer_.state();
    for (auto& group : optimizer_.param_groups())
      for (at::Tensor& parameter : group.params()) {
        const auto found = by.find(parameter.unsafeGetTensorImpl());
        if (found == by.end()) continue;
        if (const auto state = states.find(parameter.unsafeGetTensorImpl()); state != states.end()) {
          auto kept = std::move(state->second);
          states.erase(state);
          states[found->second.unsafeGetTensorImpl()] = std::move(kept);
        }
        parameter = found->second;
      }
  }

  torch::optim::Optimizer& optimizer_;
  std::unordered_map<at::TensorImpl*, at::Tensor> back_;
};

}  // namespace detail

MasterWeights::MasterWeights(Tensors parameters) : parameters_(std::move(parameters)) {
  std::unordered_set<at::TensorImpl*> seen;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& parameter = parameters_[i];
    DUALPIPE_CHECK(parameter.defined() && parameter.is_leaf() && seen.insert(parameter.unsafeGetTensorImpl()).second,
                   "MasterWeights takes each parameter of a module once, but tensor ", i, " of them ",
                   !parameter.defined()   ? "is undefined"
                   : !parameter.is_leaf() ? "was computed"
                                          : "comes twice");
    const at::ScalarType wide = detail::widened(parameter.scalar_type());
    masters_.push_back(wide == parameter.scalar_type()
                           ? parameter
                           : parameter.detach().to(wide).requires_grad_(parameter.requires_grad()));
  }
}

void MasterWeights::step(torch::optim::Optimizer& optimizer) {
  take_gradients();
  {
    const detail::ReplacedParameters replaced(optimizer, parameters_, masters_);
    optimizer.step();
  }
  write_back();
}

void MasterWeights::take_gradients() {
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < masters_.size(); ++i) {
    if (!is_copy(i)) continue;
    const at::Tensor& parameter = parameters_[i];
    const at::Tensor differs = masters_[i].to(parameter.scalar_type()).ne(parameter);
    masters_[i].copy_(at::where(differs, parameter.to(at::kFloat), masters_[i]));
    const at::Tensor& gradient = parameter.grad();
    masters_[i].mutable_grad() = gradient.defined() ? gradient.to(at::kFloat) : gradient;
  }
}

void MasterWeights::write_back() {
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < masters_.size(); ++i) {
    if (!is_copy(i)) continue;
    parameters_[i].copy_(masters_[i]);
    masters_[i].mutable_grad().reset();
  }
}

}  // namespace dualpipe
