#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/error.hpp"

// Which of the tensors between two nodes share memory: within one process a write into one of them is seen in the other,
// between two ranks it is not.
namespace dualpipe::detail {

/// Positions of two tensors that share memory; twice the same position: the tensor is a parameter.
using SharedPairs = std::vector<std::pair<int, int>>;

/// The elements of a tensor as a box in the grid that the strides of two views of one tensor span.
class ElementBox {
 public:
  /// @param strides  of the grid, descending.
  ElementBox(const at::Tensor& tensor, const std::vector<std::int64_t>& strides) {
    std::int64_t offset = tensor.storage_offset();
    for (const std::int64_t stride : strides) {
      std::int64_t size = 1;
      for (std::int64_t d = 0; d < tensor.dim(); ++d) {
        if (tensor.stride(d) != stride || tensor.size(d) == 1) continue;
        exact_ = exact_ && size == 1;
        size = tensor.size(d);
      }
      sides_.emplace_back(offset / stride, offset / stride + size);
      offset %= stride;
    }
    for (std::size_t d = 1; d < strides.size(); ++d) exact_ = exact_ && sides_[d].second * strides[d] <= strides[d - 1];
  }
  /// False only where it is certain that they have no element in common.
  bool may_meet(const ElementBox& other) const {
    if (!exact_ || !other.exact_) return true;
    for (std::size_t d = 0; d < sides_.size(); ++d)
      if (sides_[d].second <= other.sides_[d].first || other.sides_[d].second <= sides_[d].first) return false;
    return true;
  }

 private:
  std::vector<std::pair<std::int64_t, std::int64_t>> sides_;  // [begin, end)
  bool exact_ = true;                                         // else the grid does not describe the tensor
};

inline const c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.defined() && tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr;
}

inline bool share_storage(const at::Tensor& a, const at::Tensor& b) {
  const auto* storage = storage_of(a);
  return storage != nullptr && storage == storage_of(b);
}

/// Whether some element belongs to both. Slices beside each other, as chunk() makes them, have none in common.
inline bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  if (!share_storage(a, b) || a.numel() == 0 || b.numel() == 0) return false;
  if (a.element_size() != b.element_size()) return true;
  std::vector<std::int64_t> strides{1};
  for (const at::Tensor* tensor : {&a, &b})
    for (std::int64_t d = 0; d < tensor->dim(); ++d)
      if (tensor->size(d) > 1 && tensor->stride(d) > 0) strides.push_back(tensor->stride(d));
  std::sort(strides.begin(), strides.end(), std::greater<>());
  strides.erase(std::unique(strides.begin(), strides.end()), strides.end());
  return ElementBox(a, strides).may_meet(ElementBox(b, strides));
}

/// A parameter or a view of one: nobody may write into it.
inline bool is_parameter(const at::Tensor& tensor) {
  if (!tensor.defined()) return false;
  const at::TensorBase& owner = tensor.is_view() ? tensor._base() : tensor;
  return owner.is_leaf() && owner.requires_grad();
}

/// @param inputs  of the code that returned `outputs`, which may hand some of them on.
/// @param shared  the pairs among these.
inline SharedPairs shared_pairs(const Tensors& outputs, const Tensors& inputs, const SharedPairs& shared) {
  const auto were_shared = [&](const at::Tensor& a, const at::Tensor& b) {
    return std::any_of(shared.begin(), shared.end(), [&](const auto& pair) {
      const at::Tensor& first = inputs[pair.first];
      const at::Tensor& second = inputs[pair.second];
      return (share_memory(a, first) && share_memory(b, second)) || (share_memory(a, second) && share_memory(b, first));
    });
  };
  SharedPairs pairs;
  for (std::size_t j = 0; j < outputs.size(); ++j) {
    if (is_parameter(outputs[j])) pairs.emplace_back(j, j);
    for (std::size_t i = 0; i < j; ++i)
      if (share_memory(outputs[i], outputs[j]) || were_shared(outputs[i], outputs[j])) pairs.emplace_back(i, j);
  }
  return pairs;
}

/// Notices that code writes in place into one of several tensors that share memory.
class SharedWrites {
 public:
  /// @param tensors  keep their version counters while the code runs.
  SharedWrites(const Tensors& tensors, const SharedPairs& shared) : tensors_(tensors), shared_(shared) {
    for (const auto& [i, j] : shared_) before_.emplace_back(version(i), version(j));
  }
  /// @param who  ran the code, "stage 2".
  /// @throws InvalidArgument  it has written.
  void check(const std::string& who) const {
    for (std::size_t k = 0; k < shared_.size(); ++k) {
      const auto [i, j] = shared_[k];
      if (before_[k] == std::pair(version(i), version(j))) continue;
      if (i == j)
        throw InvalidArgument(str(who, " writes in place into tensor ", i,
                                  " of those it is given, which is a parameter; write into a clone() of it"));
      throw InvalidArgument(str(who, " writes in place into tensor ", i, " or ", j,
                                " of those it is given, which shared memory when they were returned: within one "
                                "process the write would be seen in both, but each travels by itself. Return a clone() "
                                "of one of them, or write into a clone()"));
    }
  }

 private:
  std::int64_t version(int position) const {
    const at::Tensor& tensor = tensors_[position];
    return tensor.is_inference() ? 0 : tensor._version();
  }

  const Tensors& tensors_;
  const SharedPairs& shared_;
  std::vector<std::pair<std::int64_t, std::int64_t>> before_;
};

}  // namespace dualpipe::detail
