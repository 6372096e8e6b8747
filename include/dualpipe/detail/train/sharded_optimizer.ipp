#pragma once

#include "dualpipe/train/sharded_optimizer.hpp"

#include <ATen/ATen.h>
#include <torch/optim/lbfgs.h>

#include <exception>
#include <string>
#include <unordered_map>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/pipeline/pipeline_state.hpp"

namespace dualpipe {
namespace detail {

using TensorMap = std::unordered_map<at::TensorImpl*, at::Tensor>;

/// The optimizer updates `by.at(p)` in the place of each parameter p that the map has, with the state that it keeps for p.
inline void replace_parameters(torch::optim::Optimizer& optimizer, const TensorMap& by) {
  auto& states = optimizer.state();
  for (auto& group : optimizer.param_groups())
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

}  // namespace detail

ShardedOptimizer::ShardedOptimizer(const DualPipe& pipe, std::unique_ptr<torch::optim::Optimizer> optimizer,
                                   const ShardedOptimizerOptions& options)
    : pipe_(pipe.ptr()), optimizer_(std::move(optimizer)), options_(options) {
  pipe_->state_->check_on_all(detail::finding_of([&] {
    DUALPIPE_CHECK(optimizer_ != nullptr, "ShardedOptimizer needs an optimizer of owned_parameters()");
    DUALPIPE_CHECK(
        dynamic_cast<const torch::optim::LBFGS*>(optimizer_.get()) == nullptr,
        "L-BFGS looks at all parameters of the model together, so it cannot be sharded; take an optimizer that "
        "updates each parameter by its own gradient, as SGD, Adam and AdamW do");
    check_parameters();
  }));
  make_masters();
}

ShardedOptimizer::~ShardedOptimizer() = default;

void ShardedOptimizer::check_parameters() const {
  const auto named = pipe_->named_parameters();
  for (const auto& group : optimizer_->param_groups())
    for (const at::Tensor& parameter : group.params()) {
      std::string name;
      for (const auto& item : named)
        if (item.value().is_same(parameter)) name = item.key();
      DUALPIPE_CHECK(!name.empty(), "the optimizer has a parameter of sizes ", parameter.sizes(),
                     " that is none of the pipeline's; make it from owned_parameters()");
      DUALPIPE_CHECK(pipe_->state_->owns(parameter), "the optimizer has parameter '", name,
                     "', which another rank owns; make it from owned_parameters() instead of parameters()");
    }
}

void ShardedOptimizer::make_masters() {
  if (!options_.master_weights) return;
  const at::NoGradGuard no_grad;
  for (const at::Tensor& parameter : pipe_->owned_parameters())
    if (parameter.scalar_type() == at::kBFloat16 || parameter.scalar_type() == at::kHalf)
      masters_.push_back({parameter, parameter.detach().to(at::kFloat)});
}

void ShardedOptimizer::update() {
  if (masters_.empty()) {
    optimizer_->step();
    return;
  }
  detail::TensorMap there, back;
  for (Master& master : masters_) {
    const at::NoGradGuard no_grad;
    const at::Tensor& parameter = master.parameter;
    const at::Tensor differs = master.weight.to(parameter.scalar_type()).ne(parameter);
    master.weight.copy_(at::where(differs, parameter.detach().to(at::kFloat), master.weight));
    if (parameter.grad().defined()) master.weight.mutable_grad() = parameter.grad().to(at::kFloat);
    there[parameter.unsafeGetTensorImpl()] = master.weight;
    back[master.weight.unsafeGetTensorImpl()] = parameter;
  }
  detail::replace_parameters(*optimizer_, there);
  const std::exception_ptr failure = [&] {
    try {
      optimizer_->step();
    } catch (...) {
      return std::current_exception();
    }
    return std::exception_ptr();
  }();
  detail::replace_parameters(*optimizer_, back);
  const at::NoGradGuard no_grad;
  for (Master& master : masters_) {
    master.weight.mutable_grad().reset();
    if (!failure) master.parameter.detach().copy_(master.weight);
  }
  if (failure) std::rethrow_exception(failure);
}

void ShardedOptimizer::step() {
  pipe_->state_->require();
  if (!pipe_->state_->shards_optimizer()) {
    check_parameters();
    update();
    ++steps_;
    return;
  }
  const std::string finding = detail::finding_of([&] { check_parameters(); });
  const auto note = [&] {
    return detail::str("\n  It ended ShardedOptimizer::step() of step ", steps_ + 1,
                       ", so parameters may be mixed of this step "
                       "and the one before. All ranks have ",
                       steps_, " whole ", steps_ == 1 ? "step" : "steps",
                       " behind them; go on from the last checkpoint, with a new pipeline.");
  };
  try {
    pipe_->state_->update_parameters(finding, [&] { update(); });
  } catch (const InvalidArgument&) {
    throw;
  } catch (const CommError& error) {
    std::throw_with_nested(CommError(error.origin_rank(), error.operation(), error.what() + note()));
  } catch (const Error& error) {
    std::throw_with_nested(Error(error.what() + note()));
  }
  ++steps_;
}

}  // namespace dualpipe
