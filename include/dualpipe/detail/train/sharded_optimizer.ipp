#pragma once

#include "dualpipe/train/sharded_optimizer.hpp"

#include <torch/optim/lbfgs.h>

#include <exception>
#include <string>
#include <unordered_map>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/pipeline/pipeline_state.hpp"

namespace dualpipe {

ShardedOptimizer::ShardedOptimizer(const DualPipe& pipe, std::unique_ptr<torch::optim::Optimizer> optimizer,
                                   const ShardedOptimizerOptions& options)
    : pipe_(pipe.ptr()), optimizer_(std::move(optimizer)) {
  pipe_->state_->check_on_all(detail::finding_of([&] {
    DUALPIPE_CHECK(optimizer_ != nullptr, "ShardedOptimizer needs an optimizer of owned_parameters()");
    DUALPIPE_CHECK(
        dynamic_cast<const torch::optim::LBFGS*>(optimizer_.get()) == nullptr,
        "L-BFGS looks at all parameters of the model together, so it cannot be sharded; take an optimizer that "
        "updates each parameter by its own gradient, as SGD, Adam and AdamW do");
    check_parameters();
  }));
  if (options.master_weights) masters_.emplace(pipe_->owned_parameters());
}

ShardedOptimizer::~ShardedOptimizer() = default;

void ShardedOptimizer::check_parameters() const {
  std::unordered_map<at::TensorImpl*, std::string> names;
  for (const auto& item : pipe_->named_parameters()) names[item.value().unsafeGetTensorImpl()] = item.key();
  for (const auto& group : optimizer_->param_groups())
    for (const at::Tensor& parameter : group.params()) {
      const auto name = names.find(parameter.unsafeGetTensorImpl());
      DUALPIPE_CHECK(name != names.end(), "the optimizer has a parameter of sizes ", parameter.sizes(),
                     " that is none of the pipeline's; make it from owned_parameters()");
      DUALPIPE_CHECK(pipe_->state_->owns(parameter), "the optimizer has parameter '", name->second,
                     "', which another rank owns; make it from owned_parameters() instead of parameters()");
    }
}

void ShardedOptimizer::update() {
  if (masters_)
    masters_->step(*optimizer_);
  else
    optimizer_->step();
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
                       ", so parameters may be mixed of this step and the one before. All ranks have ", steps_,
                       " whole ", steps_ == 1 ? "step" : "steps",
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
