#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <typeinfo>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

/// Whose backward runs.
struct BackwardOwner {
  std::shared_ptr<const torch::nn::Module> module = nullptr;  ///< null: none
  int stage = 0;
};

/// A split backward runs an operation that has a parameter among its arguments twice. A function of the user's that adds
/// to the parameter's gradient itself, or counts in a buffer, would do so twice: this notices it the first time.
class StateWatch {
 public:
  /// Watches `node` until removed.
  static void put(torch::autograd::Node& node, const BackwardOwner& owner) {
    auto watch = std::make_shared<StateWatch>(owner);
    node.add_pre_hook(std::make_unique<Before>(watch));
    node.add_post_hook(std::make_unique<After>(std::move(watch)));
  }
  static void remove(torch::autograd::Node& node) {
    std::erase_if(node.post_hooks(),
                  [](const auto& hook) { return dynamic_cast<const After*>(hook.get()) != nullptr; });
  }
  /// LibTorch's own operations leave no traces.
  static bool may_write(const torch::autograd::Node& node) {
    const std::string_view type = typeid(node).name();
    return type.find("5torch8autograd") == std::string_view::npos || type.find("CppNode") != std::string_view::npos;
  }

  explicit StateWatch(const BackwardOwner& owner) : owner_(owner) {}

 private:
  using State = std::pair<const at::TensorImpl*, std::uint32_t>;  // which tensor, and its version

  struct Before final : torch::autograd::FunctionPreHook {
    explicit Before(std::shared_ptr<StateWatch> w) : watch(std::move(w)) {}
    torch::autograd::variable_list operator()(const torch::autograd::variable_list& gradients) override {
      watch->before_ = watch->states();
      return gradients;
    }
    std::shared_ptr<StateWatch> watch;
  };
  struct After final : torch::autograd::FunctionPostHook {
    explicit After(std::shared_ptr<StateWatch> w) : watch(std::move(w)) {}
    torch::autograd::variable_list operator()(const torch::autograd::variable_list& outputs,
                                              const torch::autograd::variable_list&) override {
      watch->check();
      return outputs;
    }
    std::shared_ptr<StateWatch> watch;
  };

  static State state_of(const at::Tensor& tensor) {
    if (!tensor.defined()) return {nullptr, 0};
    return {tensor.unsafeGetTensorImpl(), tensor.is_inference() ? 0 : tensor._version()};
  }
  std::vector<State> states() const {
    std::vector<State> all;
    for (const at::Tensor& parameter : owner_.module->parameters()) all.push_back(state_of(parameter.grad()));
    for (const at::Tensor& buffer : owner_.module->buffers()) all.push_back(state_of(buffer));
    return all;
  }
  void check() const {
    const std::vector<State> now = states();
    std::size_t i = 0;
    const auto check = [&](const std::string& what, const std::string& name) {
      DUALPIPE_CHECK(now[i] == before_[i], "a backward of stage ", owner_.stage, " writes to ", what, " '", name,
                     "' itself, and would do so twice: the split of a backward runs an operation for its input "
                     "gradients and again for its weight gradients. Return the gradient instead of adding it, or say "
                     "split_backward(false) of the stage in the stage factory");
      ++i;
    };
    for (const auto& item : owner_.module->named_parameters()) check("the gradient of parameter", item.key());
    for (const auto& item : owner_.module->named_buffers()) check("buffer", item.key());
  }

  BackwardOwner owner_;
  std::vector<State> before_;
};

}  // namespace dualpipe::detail
