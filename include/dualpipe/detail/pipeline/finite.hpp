#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/pipeline/vote.hpp"

namespace dualpipe::detail {

/// Looks for gradients that are infinite or NaN. One pass over them, queued on the device where they are.
class FiniteCheck {
 public:
  /// @param gradients  may be undefined, sparse or complex.
  explicit FiniteCheck(const Tensors& gradients) {
    const at::NoGradGuard no_grad;
    Tensors extremes;  // NaN is less and greater than everything to aminmax
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      at::Tensor values = gradients[i];
      if (!values.defined()) continue;
      if (values.is_sparse()) values = values.coalesce()._values();
      if (values.layout() != at::kStrided) values = values.to_dense();
      if (values.is_complex()) values = at::view_as_real(values);
      if (values.numel() == 0) continue;
      const auto [least, greatest] = at::aminmax(values.flatten(), 0);
      extremes.insert(extremes.end(), {least, greatest});
      checked_.push_back(i);
    }
    if (!checked_.empty()) infinite_ = at::stack(extremes).isfinite().logical_not().view({-1, 2}).any(1);
  }

  /// How many there are, float64 and zero-dimensional, on the device of the gradients. Undefined without gradients.
  at::Tensor count() const { return infinite_.defined() ? infinite_.sum().to(at::kDouble) : at::Tensor(); }
  /// Waits for the device. Indices of those gradients.
  std::vector<std::size_t> found() const {
    std::vector<std::size_t> indices;
    if (!infinite_.defined()) return indices;
    const at::Tensor on_host = infinite_.cpu();
    for (std::size_t i = 0; i < checked_.size(); ++i)
      if (on_host.const_data_ptr<bool>()[i]) indices.push_back(checked_[i]);
    return indices;
  }

 private:
  std::vector<std::size_t> checked_;
  at::Tensor infinite_;  // bool [checked_]
};

/// Appends what is wrong with the losses.
///
/// @param losses   of all replicas, on the host.
/// @param weights  of them; those of weight 0 may be anything. Empty: all are 1.
inline void add_non_finite_losses(const at::Tensor& losses, const std::vector<double>& weights,
                                  const MicroBatchCount& count, std::string& text) {
  constexpr int shown = 4;
  int found = 0;
  for (int i = 0; i < count.all(); ++i) {
    if (!weights.empty() && weights[i] == 0) continue;
    const double loss = losses.const_data_ptr<double>()[i];
    if (std::isfinite(loss) || ++found > shown) continue;
    text += str(text.empty() ? "" : ", ", "the loss of micro-batch ", i % count.of_replica);
    if (count.num_replicas > 1) text += str(" of replica ", i / count.of_replica);
    text += str(" is ", loss);
  }
  if (found > shown) text += str(", and so on for ", found - shown, " more");
}

/// What of a step is not finite, the same on every rank; empty: nothing.
inline std::string non_finite(const StepVote& vote, const std::vector<double>& weights, const MicroBatchCount& count) {
  std::string text;
  add_non_finite_losses(vote.losses, weights, count, text);
  for (const std::string& finding : vote.findings)
    if (!finding.empty()) return str(text, text.empty() ? "" : ", ", finding);
  return text;
}

}  // namespace dualpipe::detail
