#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"

// Rows of tensors that the collectives of a group move, and what their backward needs.

namespace dualpipe::detail {

using Rows = std::vector<std::int64_t>;  // by rank

inline std::string rows_text(const Rows& rows) {
  std::string text = "[";
  for (const std::int64_t count : rows) text += (text.size() > 1 ? ", " : "") + std::to_string(count);
  return text + "]";
}

inline std::string tensor_text(const at::Tensor& tensor) { return to_string(signature_of({tensor})); }

/// What the forward remembers of one moved tensor for its backward.
struct MovedTensor {
  bool differentiable = false;       // floating point, and defined: the same on all ranks
  bool own_gradient = false;         // this rank's input requires grad
  std::vector<bool> wants_gradient;  // by rank: the part that came from there requires grad
  Rows sent, received;               // rows
  at::TensorOptions options;
  std::vector<std::int64_t> row;  // sizes of one row of the input

  std::vector<std::int64_t> sizes(std::int64_t rows) const {
    std::vector<std::int64_t> all{rows};
    all.insert(all.end(), row.begin(), row.end());
    return all;
  }
  at::Tensor zeros(std::int64_t rows) const { return at::zeros(sizes(rows), options); }
  TensorSignature signature(std::int64_t rows) const {
    return {.dtype = options.dtype().toScalarType(), .sizes = sizes(rows)};
  }
  /// What each rank sends back: the gradient of the rows that went there, or nothing if this rank's input has none.
  Signature returned() const {
    Signature all;
    for (const std::int64_t rows : sent)
      all.push_back(own_gradient ? signature(rows) : TensorSignature{.defined = false, .sizes = {}});
    return all;
  }
};
using MovedTensors = std::vector<MovedTensor>;

inline MovedTensor moved_tensor(const at::Tensor& input) {
  MovedTensor kept;
  if (!input.defined()) return kept;
  kept.differentiable = input.is_floating_point() || input.is_complex();
  kept.own_gradient = input.requires_grad();
  kept.options = input.options().requires_grad(false);
  if (input.dim() > 0) kept.row = input.sizes().slice(1).vec();
  return kept;
}

/// The parts of all ranks must have the dtype and row sizes of this rank's own part.
inline void check_rank_parts(const char* what, std::size_t index, const Tensors& parts, std::size_t me) {
  const at::Tensor& own = parts[me];
  for (std::size_t r = 0; r < parts.size(); ++r) {
    const at::Tensor& part = parts[r];
    const bool fits = part.defined() == own.defined() &&
                      (!own.defined() || (part.scalar_type() == own.scalar_type() && part.dim() == own.dim() &&
                                          part.sizes().slice(1) == own.sizes().slice(1)));
    DUALPIPE_CHECK(fits, what, ": ranks of the group disagree about tensor ", index, ": rank ", me, " moves ",
                   tensor_text(own), ", rank ", r, " moves ", tensor_text(part),
                   "; only the number of rows, the first dimension, may differ");
  }
}

inline void check_rows(const char* what, std::size_t index, const at::Tensor& tensor) {
  DUALPIPE_CHECK(!tensor.defined() || tensor.dim() > 0, what, " moves rows, but tensor ", index, " has no dimensions");
}

inline Rows rows_of(const Tensors& parts) {
  Rows rows;
  for (const at::Tensor& part : parts) rows.push_back(part.defined() ? part.size(0) : 0);
  return rows;
}

/// Parts of one tensor, each with its requires_grad.
inline Tensors cut_rows(const at::Tensor& tensor, const Rows& rows) {
  if (!tensor.defined()) return Tensors(rows.size());
  const at::NoGradGuard no_grad;
  Tensors parts = tensor.detach().split_with_sizes(rows, 0);
  for (at::Tensor& part : parts) part = part.detach().set_requires_grad(tensor.requires_grad());
  return parts;
}

/// Notes which parts require grad. Comes before they are merged, as merging drops the flag.
inline void note_parts(MovedTensor& kept, const Tensors& parts) {
  kept.received = rows_of(parts);
  kept.wants_gradient.clear();
  for (const at::Tensor& part : parts) kept.wants_gradient.push_back(part.defined() && part.requires_grad());
}

inline at::Tensor with_gradient_flag(at::Tensor tensor, const MovedTensor& kept) {
  bool requires_grad = false;
  for (const bool wanted : kept.wants_gradient) requires_grad = requires_grad || wanted;
  return tensor.defined() ? tensor.set_requires_grad(requires_grad) : tensor;
}

inline at::Tensor concatenated_rows(const Tensors& parts) {
  const at::NoGradGuard no_grad;
  return parts.front().defined() ? at::cat(parts) : at::Tensor();
}

/// Sums in rank order, into the first defined part. Undefined parts count as zeros.
inline at::Tensor summed_parts(Tensors parts) {
  const at::NoGradGuard no_grad;
  at::Tensor sum;
  for (at::Tensor& part : parts) {
    if (!part.defined()) continue;
    part = part.detach();
    sum = sum.defined() ? sum.add_(part) : part;
  }
  return sum;
}

/// The gradient of the input, from the gradients of the rows that went to each rank.
inline at::Tensor returned_gradient(const MovedTensor& kept, const Tensors& parts) {
  if (!kept.own_gradient) return {};
  const at::NoGradGuard no_grad;
  return at::cat(parts);
}

/// Cuts an output's gradient into the gradients of each rank's part. A part that requires grad gets zeros if nothing
/// flows in, so that its rank knows what comes.
inline Tensors gradient_rows(const at::Tensor& gradient, const MovedTensor& kept) {
  Tensors parts = cut_rows(gradient, kept.received);
  for (std::size_t r = 0; r < parts.size(); ++r) {
    if (!kept.wants_gradient[r]) {
      parts[r] = at::Tensor();
    } else if (!parts[r].defined()) {
      parts[r] = kept.zeros(kept.received[r]);
    }
  }
  return parts;
}

}  // namespace dualpipe::detail
