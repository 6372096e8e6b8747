#include <utility>

#include "dualpipe/detail/pipeline/unfinished_step.hpp"

namespace dualpipe {
namespace {

template <class Body>
void explained(const Body& body) {
  try {
    body();
  } catch (const CommError& error) {
    throw CommError(error.origin_rank(), error.operation(),
                    detail::str(error.what(),
                                "\n  The step was committed before (DualPipeOptions::asynchronous), so its gradients, "
                                "and parameters updated by them, may hold anything: go back to a checkpoint."));
  }
}

}  // namespace

at::Tensor reduced(const at::Tensor& losses, LossReduction reduction) {
  return reduction == LossReduction::mean ? losses.mean() : losses.sum();
}

StepResult::Unfinished::Unfinished(Pending end, LossReduction reduction, at::Tensor loss, at::Tensor losses)
    : end_(std::move(end)), reduction_(reduction), loss_(std::move(loss)), losses_(std::move(losses)) {}

void StepResult::Unfinished::finish() {
  if (!end_) return;
  explained([&] { end_.synchronize(); });
  loss_.copy_(reduced(losses_, reduction_));
  end_ = {};
}

void StepResult::Unfinished::check() {
  if (end_) explained([&] { end_.wait(); });
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
