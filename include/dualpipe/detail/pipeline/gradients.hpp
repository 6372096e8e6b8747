#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/detail/widened.hpp"

namespace dualpipe::detail {

/// Of the gradients that a step accumulates, sums over ranks and hands out.
inline at::ScalarType gradient_type(const at::Tensor& parameter, GradientDtype dtype) {
  const at::ScalarType own = parameter.scalar_type();
  return dtype == GradientDtype::float32 ? widened(own) : own;
}

/// Makes a parameter's gradient float32 when the first micro-batch has left it. A backward adds all others to it in
/// place, and so in float32: autograd looks at the dtype of what it adds, not at that of what is there.
class WidenedGradient final : public torch::autograd::PostAccumulateGradHook {
 public:
  /// Until removed. What hook the parameter has runs behind this one.
  static void put(const at::Tensor& parameter) {
    auto hook = std::make_unique<WidenedGradient>();
    hook->next_ = std::move(torch::autograd::impl::post_acc_grad_hooks(parameter));
    torch::autograd::impl::set_post_acc_grad_hooks(parameter, std::move(hook));
  }
  static void remove(const at::Tensor& parameter) {
    auto& slot = torch::autograd::impl::post_acc_grad_hooks(parameter);
    if (auto* const own = dynamic_cast<WidenedGradient*>(slot.get())) slot = std::exchange(own->next_, nullptr);
  }

  void operator()(const at::Tensor& parameter) override {
    at::Tensor& gradient = parameter.mutable_grad();
    if (gradient.defined() && gradient.scalar_type() != at::kFloat) gradient = gradient.to(at::kFloat);
    if (next_) (*next_)(parameter);
  }

 private:
  std::unique_ptr<torch::autograd::PostAccumulateGradHook> next_;
};

/// Moves the gradients of `parameters` aside while a step accumulates into fresh ones. Unless committed, the destructor
/// restores them: the same tensor objects with the same values.
class GradientTransaction {
 public:
  /// @param is_kept  whether a parameter has a gradient after the step; null: all have.
  GradientTransaction(Tensors parameters, GradientDtype dtype,
                      std::function<bool(const at::Tensor& parameter)> is_kept = nullptr)
      : parameters_(std::move(parameters)), dtype_(dtype), is_kept_(std::move(is_kept)) {
    aside_.reserve(parameters_.size());
    for (at::Tensor& parameter : parameters_) {
      aside_.push_back(std::move(parameter.mutable_grad()));
      parameter.mutable_grad() = at::Tensor();
      if (parameter.requires_grad() && widens(parameter)) WidenedGradient::put(parameter);
    }
  }
  ~GradientTransaction() {
    for (const at::Tensor& parameter : parameters_)
      if (parameter.requires_grad() && widens(parameter)) WidenedGradient::remove(parameter);
    for (std::size_t i = 0; i < aside_.size(); ++i) parameters_[i].mutable_grad() = std::move(aside_[i]);
  }
  GradientTransaction(const GradientTransaction&) = delete;
  GradientTransaction& operator=(const GradientTransaction&) = delete;

  /// Adds what was set aside to the fresh gradients. May throw, so it comes before the vote.
  void add_up() {
    const at::NoGradGuard no_grad;
    ways_.reserve(aside_.size());
    for (std::size_t i = 0; i < aside_.size(); ++i) {
      at::Tensor& fresh = parameters_[i].mutable_grad();
      const at::Tensor& before = aside_[i];
      if (is_kept_ && !is_kept_(parameters_[i])) {
        fresh.reset();
        ways_.push_back(Way::replace);
        continue;
      }
      if (before.defined() && fresh.defined()) fresh = sum_of(before, fresh, widens(parameters_[i]));
      ways_.push_back(way_of(before, fresh));
    }
  }

  /// Puts the sums into the tensors that the caller knows. Comes after add_up() and the vote. Does not throw, unless
  /// the device has failed since.
  void commit() {
    const at::NoGradGuard no_grad;
    Tensors known = std::exchange(aside_, {});
    for (std::size_t i = 0; i < known.size(); ++i) {
      at::Tensor& fresh = parameters_[i].mutable_grad();
      if (ways_[i] == Way::exchange) known[i].set_data(fresh);
      if (ways_[i] == Way::copy) known[i].copy_(fresh);
      if (ways_[i] != Way::replace) fresh = std::move(known[i]);
    }
  }

 private:
  /// How a sum gets into the caller's tensor.
  enum class Way {
    replace,   ///< it does not: there was none, or of another layout; the sum takes its place, as in one process
    keep,      ///< there is nothing to add
    exchange,  ///< the tensor gets the memory of the sum
    copy,      ///< others see the tensor's memory too, as where gradients are slices of one buffer
  };

  bool widens(const at::Tensor& parameter) const { return gradient_type(parameter, dtype_) != parameter.scalar_type(); }

  /// @param wide  the dtype is that of `fresh`, else that of `before`.
  static at::Tensor sum_of(const at::Tensor& before, at::Tensor& fresh, bool wide) {
    DUALPIPE_CHECK(before.sizes() == fresh.sizes() && before.device() == fresh.device(),
                   "the gradient of a parameter has sizes ", before.sizes(), " on ", before.device(),
                   ", but a step adds one of sizes ", fresh.sizes(), " on ", fresh.device());
    if (fresh.layout() == at::kStrided && (wide || fresh.scalar_type() == before.scalar_type()))
      return fresh.add_(before);
    return before.layout() == at::kStrided ? at::add(before, fresh).to(before.scalar_type()) : at::add(fresh, before);
  }

  static Way way_of(const at::Tensor& before, const at::Tensor& fresh) {
    if (!before.defined()) return Way::replace;
    if (!fresh.defined()) return Way::keep;
    if (before.layout() != fresh.layout() || before.scalar_type() != fresh.scalar_type() ||
        before.is_inference() != fresh.is_inference())
      return Way::replace;
    if (before.layout() != at::kStrided) return Way::exchange;
    if (at::has_internal_overlap(before) == at::MemOverlap::Yes) return Way::replace;
    const bool exclusive = before.storage().use_count() == 1 && before.storage().nbytes() == before.nbytes();
    return exclusive && before.is_leaf() ? Way::exchange : Way::copy;
  }

  Tensors parameters_;
  GradientDtype dtype_;
  std::function<bool(const at::Tensor&)> is_kept_;
  Tensors aside_;
  std::vector<Way> ways_;
};

}  // namespace dualpipe::detail
