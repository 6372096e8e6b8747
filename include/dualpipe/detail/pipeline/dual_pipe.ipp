#pragma once

#include "dualpipe/pipeline/dual_pipe.hpp"

#include <set>
#include <utility>

#include "dualpipe/detail/pipeline/pipeline_state.hpp"

namespace dualpipe {

namespace detail {

inline PipelineState::Ranks one_pipeline(std::shared_ptr<Communicator> communicator) {
  DUALPIPE_CHECK(communicator != nullptr, "DualPipe needs a communicator");
  const int size = communicator->size();
  return {communicator, std::move(communicator), {.pipeline = size}};
}

}  // namespace detail

DualPipeImpl::DualPipeImpl(std::shared_ptr<Communicator> communicator, DualPipeOptions options,
                           const StageFactory& factory)
    : DualPipeImpl(std::make_unique<detail::PipelineState>(detail::one_pipeline(std::move(communicator)),
                                                           std::move(options), factory, nullptr)) {}

DualPipeImpl::DualPipeImpl(const Mesh& mesh, DualPipeOptions options, const StageFactory& factory, IsExpert is_expert)
    : DualPipeImpl(std::make_unique<detail::PipelineState>(
          detail::PipelineState::Ranks{mesh.world(), mesh.pipeline(), mesh.shape()}, std::move(options), factory,
          std::move(is_expert))) {}

DualPipeImpl::DualPipeImpl(std::unique_ptr<detail::PipelineState> state)
    : torch::nn::Module("DualPipe"), state_(std::move(state)) {
  std::set<torch::nn::Module*> registered;
  for (const auto& [number, stage] : state_->stages())
    if (stage.module() && registered.insert(stage.module().get()).second)
      register_module(detail::str("stage", number), stage.module());
  state_->start();
}

DualPipeImpl::~DualPipeImpl() = default;

StepResult DualPipeImpl::step(const Batch& batch, const LossFn& loss) { return state_->step(batch, loss, *this); }

StepResult DualPipeImpl::evaluate(const Batch& batch, const LossFn& loss) {
  return state_->evaluate(batch, loss, *this);
}

Tensors DualPipeImpl::predict(const Batch& batch, bool everywhere) { return state_->predict(batch, everywhere, *this); }

Batch DualPipeImpl::broadcast_batch(const Batch& batch) { return state_->broadcast_batch(batch); }

torch::Tensor DualPipeImpl::clip_grad_norm_(double max_norm, bool error_if_nonfinite) {
  return state_->clip_grad_norm(max_norm, error_if_nonfinite);
}

void DualPipeImpl::broadcast_parameters() { state_->broadcast_parameters(); }

void DualPipeImpl::set_step(std::int64_t step) {
  DUALPIPE_CHECK(step >= 0, "the number of steps must not be negative, got ", step);
  state_->set_step(step);
}

void DualPipeImpl::add_observer(std::shared_ptr<Observer> observer) {
  DUALPIPE_CHECK(observer != nullptr, "add_observer got no observer");
  state_->add_observer(std::move(observer));
}

void DualPipeImpl::write_record(const std::string& path) const { state_->write_record(path); }
const std::shared_ptr<Communicator>& DualPipeImpl::communicator() const { return state_->communicator(); }

const std::shared_ptr<Communicator>& DualPipeImpl::world() const { return state_->ranks().world; }

int DualPipeImpl::expert_part(const std::string& name) const { return state_->expert_part(name); }

std::vector<std::string> DualPipeImpl::tied_names(const std::string& name) const { return state_->tied_names(name); }

const Schedule& DualPipeImpl::schedule() const { return state_->schedule(); }

std::vector<int> DualPipeImpl::local_stages() const {
  std::vector<int> numbers;
  for (const auto& [number, stage] : state_->stages()) numbers.push_back(number);
  return numbers;
}

bool DualPipeImpl::feeds_inputs() const { return state_->feeds_inputs(); }

bool DualPipeImpl::computes_loss() const { return state_->computes_loss(); }

std::vector<torch::Tensor> DualPipeImpl::parameters(bool recurse) const { return named_parameters(recurse).values(); }

torch::OrderedDict<std::string, torch::Tensor> DualPipeImpl::named_parameters(bool recurse) const {
  torch::OrderedDict<std::string, torch::Tensor> unique;
  std::set<at::TensorImpl*> seen;
  for (const auto& item : torch::nn::Module::named_parameters(recurse))
    if (seen.insert(item.value().unsafeGetTensorImpl()).second) unique.insert(item.key(), item.value());
  return unique;
}

std::vector<torch::Tensor> DualPipeImpl::owned_parameters() const {
  Tensors owned;
  for (const at::Tensor& parameter : parameters())
    if (state_->owns(parameter)) owned.push_back(parameter);
  return owned;
}

void StepResult::wait() const {
  if (unfinished_) unfinished_->finish();
}

std::vector<double> StepResult::micro_batch_losses() const {
  wait();
  const at::Tensor flat = losses.contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

}  // namespace dualpipe
