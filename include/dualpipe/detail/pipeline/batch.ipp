#pragma once

#include "dualpipe/pipeline/batch.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <string>
#include <utility>

namespace dualpipe {
namespace detail {

/// How tensors split: `given`, or all along `dim`.
inline std::vector<Split> splits_of(const Tensors& tensors, const std::vector<Split>& given, int dim) {
  return given.empty() ? std::vector<Split>(tensors.size(), Split{.dim = dim}) : given;
}

/// Calls `each(position, split)` for each entry of `splits`, at the position of its first tensor. A list has `count`.
template <class Each>
void for_each_split(const Tensors& tensors, const std::vector<Split>& splits, const char* what, int count,
                    const Each& each) {
  std::size_t next = 0;
  for (const Split& split : splits) {
    const std::size_t end = next + (split.how == Split::How::list ? count : 1);
    if (end <= tensors.size()) each(next, split);
    next = end;
  }
  DUALPIPE_CHECK(next == tensors.size(), "Batch::", what, " has ", tensors.size(),
                 tensors.size() == 1 ? " tensor" : " tensors", ", but DualPipeOptions::split.", what, " is for ", next,
                 "; a list takes one for each of ", count, " micro-batches");
}

inline std::int64_t samples_of(const at::Tensor& tensor, std::size_t i, const char* what, int dim) {
  DUALPIPE_CHECK(tensor.defined(), "Batch::", what, "[", i, "] is undefined");
  DUALPIPE_CHECK(tensor.dim() > dim, "Batch::", what, "[", i, "] has ", tensor.dim(),
                 " dimensions and cannot be split along dimension ", dim,
                 " (DualPipeOptions::batch_dim and DualPipeOptions::split)");
  return tensor.size(dim);
}

/// Appends the part of each tensor to `member` of each element of `into`.
///
/// @param slices  from the number of samples to the number in each micro-batch.
template <class Slices>
void split_tensors(const Tensors& tensors, const std::vector<Split>& splits, const char* what, Tensors Batch::* member,
                   const Slices& slices, std::vector<Batch>& into) {
  if (tensors.empty()) return;
  for_each_split(tensors, splits, what, static_cast<int>(into.size()), [&](std::size_t i, const Split& split) {
    if (split.how == Split::How::chunk) {
      std::int64_t begin = 0;
      const std::vector<std::int64_t> sizes = slices(samples_of(tensors[i], i, what, split.dim), i, what, split.dim);
      const at::Tensor& tensor = tensors[i];
      for (std::size_t m = 0; m < into.size(); begin += sizes[m++])
        (into[m].*member)
            .push_back(tensor.requires_grad() && tensor.is_leaf()
                           ? tensor.detach().narrow(split.dim, begin, sizes[m]).set_requires_grad(true)
                           : tensor.narrow(split.dim, begin, sizes[m]));
      return;
    }
    for (std::size_t m = 0; m < into.size(); ++m) {
      const std::size_t at = i + (split.how == Split::How::list ? m : 0);
      DUALPIPE_CHECK(tensors[at].defined(), "Batch::", what, "[", at, "] is undefined");
      (into[m].*member).push_back(tensors[at]);
    }
  });
}

/// As split_tensors, of all members.
template <class Slices>
std::vector<Batch> cut_batch(const Batch& batch, int count, int dim, const BatchSplit& split, const Slices& slices) {
  std::vector<Batch> into(count);
  split_tensors(batch.inputs, splits_of(batch.inputs, split.inputs, dim), "inputs", &Batch::inputs, slices, into);
  split_tensors(batch.targets, splits_of(batch.targets, split.targets, dim), "targets", &Batch::targets, slices, into);
  split_tensors(batch.extras, splits_of(batch.extras, split.extras, dim), "extras", &Batch::extras, slices, into);
  return into;
}

}  // namespace detail

Batch Batch::from_micro_batches(std::vector<Batch> micro_batches) {
  DUALPIPE_CHECK(!micro_batches.empty(), "Batch::from_micro_batches got no micro-batch");
  const std::size_t weights = micro_batches[0].weights.size();
  Batch batch;
  for (std::size_t i = 0; i < micro_batches.size(); ++i) {
    Batch& each = micro_batches[i];
    DUALPIPE_CHECK(each.micro_batches.empty(), "micro-batch ", i, " is itself made of micro-batches");
    DUALPIPE_CHECK(each.weights.size() == weights && weights <= 1, "micro-batch ", i, " has ", each.weights.size(),
                   " weights, micro-batch 0 has ", weights, "; give each one, or none");
    batch.weights.insert(batch.weights.end(), each.weights.begin(), each.weights.end());
    each.weights.clear();
  }
  batch.micro_batches = std::move(micro_batches);
  return batch;
}

Batch Batch::chunk(int count, int dim, const BatchSplit& split) const {
  DUALPIPE_CHECK(count >= 1, "Batch::chunk: the number of micro-batches must be at least 1, got ", count);
  DUALPIPE_CHECK(micro_batches.empty() && weights.empty(), "Batch::chunk cuts a whole batch without weights; this one ",
                 micro_batches.empty() ? "has weights" : "is made of micro-batches");
  std::int64_t samples = -1;
  std::string first;
  const auto look = [&](const Tensors& tensors, const std::vector<Split>& given, const char* what) {
    if (tensors.empty()) return;
    detail::for_each_split(tensors, detail::splits_of(tensors, given, dim), what, count,
                           [&](std::size_t i, const Split& each) {
                             if (each.how != Split::How::chunk) return;
                             const std::int64_t size = detail::samples_of(tensors[i], i, what, each.dim);
                             if (samples < 0) samples = size, first = detail::str("Batch::", what, "[", i, "]");
                             DUALPIPE_CHECK(size == samples, "Batch::", what, "[", i, "] has ", size, " samples, ",
                                            first, " has ", samples);
                           });
  };
  look(inputs, split.inputs, "inputs");
  look(targets, split.targets, "targets");
  look(extras, split.extras, "extras");
  DUALPIPE_CHECK(samples >= 1, "Batch::chunk: the batch has no samples");
  const auto cut = static_cast<int>(std::min<std::int64_t>(count, samples));
  std::vector<std::int64_t> sizes(cut, samples / cut);
  for (int m = 0; m < samples % cut; ++m) ++sizes[m];
  Batch batch;
  batch.micro_batches = detail::cut_batch(*this, cut, dim, split, [&](const auto&...) { return sizes; });
  batch.weights.assign(sizes.begin(), sizes.end());
  return batch;
}

std::vector<Batch> split_batch(const Batch& batch, int count, int dim, const BatchSplit& split) {
  if (!batch.micro_batches.empty()) {
    DUALPIPE_CHECK(static_cast<int>(batch.micro_batches.size()) == count, "the batch was made of ",
                   batch.micro_batches.size(), " micro-batches, the step has ", count);
    return batch.micro_batches;
  }
  return detail::cut_batch(
      batch, count, dim, split, [&](std::int64_t size, std::size_t i, const char* what, int along) {
        DUALPIPE_CHECK(size % count == 0, "Batch::", what, "[", i, "] has ", size, " elements along dimension ", along,
                       ", which ", count, " micro-batches do not divide; pad or drop to a multiple of ", count,
                       ", or cut it unevenly with Batch::chunk");
        return std::vector<std::int64_t>(count, size / count);
      });
}

}  // namespace dualpipe
