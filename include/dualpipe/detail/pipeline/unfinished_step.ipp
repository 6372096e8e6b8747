#pragma once

#include "dualpipe/detail/pipeline/unfinished_step.hpp"

#include <ATen/ATen.h>

#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

inline constexpr const char* after_commit_note =
    "\n  The step was committed before (DualPipeOptions::asynchronous), so its gradients, and parameters updated by "
    "them, may hold anything: go back to a checkpoint.";

/// Runs `body`; a CommError that it throws says in addition what the state of the training is.
template <class Body>
void after_commit(const Body& body) {
  try {
    body();
  } catch (const CommError& error) {
    throw CommError(error.origin_rank(), error.operation(), str(error.what(), after_commit_note));
  }
}

at::Tensor reduced(const at::Tensor& losses, LossReduction reduction, const at::Tensor& weights) {
  if (weights.defined()) {
    const at::Tensor sum = at::where(weights > 0, losses * weights, at::zeros_like(losses)).sum();
    return reduction == LossReduction::mean ? sum / weights.sum() : sum;
  }
  return reduction == LossReduction::mean ? losses.mean() : losses.sum();
}

UnfinishedStep::UnfinishedStep(Pending end, LossReduction reduction, at::Tensor loss, at::Tensor losses,
                               at::Tensor weights, std::function<std::string()> finding)
    : end_(std::move(end)),
      reduction_(reduction),
      loss_(std::move(loss)),
      losses_(std::move(losses)),
      weights_(std::move(weights)),
      finding_(std::move(finding)) {}

void UnfinishedStep::finish() {
  if (end_) {
    after_commit([&] { end_.synchronize(); });
    loss_.copy_(reduced(losses_, reduction_, weights_));
    end_ = {};
  }
  const std::string found = finding_ ? finding_() : "";
  if (!found.empty()) throw Error(found + after_commit_note);
}

void UnfinishedStep::check() {
  if (end_) after_commit([&] { end_.wait(); });
}

}  // namespace dualpipe::detail
