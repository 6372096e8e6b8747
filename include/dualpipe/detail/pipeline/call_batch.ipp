#pragma once

#include "dualpipe/detail/pipeline/call_batch.hpp"

#include <ATen/ATen.h>

#include <string>

#include "dualpipe/detail/pipeline/digest.hpp"

namespace dualpipe::detail {

/// A member of a batch, of the whole one or of all of its micro-batches.
inline CallStatement::Part batch_part(const Batch& batch, Tensors Batch::* member, bool needed) {
  CallStatement::Part part{.needed = needed, .passed = !(batch.*member).empty()};
  for (const Batch& micro_batch : batch.micro_batches) part.passed = part.passed || !(micro_batch.*member).empty();
  if (!part.passed) return part;
  Digest digest;
  digest.add_values(batch.*member);
  for (const Batch& micro_batch : batch.micro_batches) digest.add_values(micro_batch.*member);
  part.digest = digest.value();
  return part;
}

inline void check_no_gradient(const Tensors& tensors, const std::string& name) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    DUALPIPE_CHECK(!tensors[i].defined() || !tensors[i].requires_grad(), name, "[", i,
                   "] requires grad, but gradients end at the batch: what computes it would not be trained; pass "
                   "detach(), or let a stage compute it");
}

inline void check_no_gradients(const Batch& batch, const std::string& name) {
  check_no_gradient(batch.inputs, name + "inputs");
  check_no_gradient(batch.targets, name + "targets");
  check_no_gradient(batch.extras, name + "extras");
  for (std::size_t m = 0; m < batch.micro_batches.size(); ++m)
    check_no_gradients(batch.micro_batches[m], str("micro-batch ", m, ": Batch::"));
}

/// How many samples a micro-batch has; -1 where no tensor tells.
inline std::int64_t micro_batch_size(const Batch& micro_batch, int dim) {
  for (const Tensors* tensors : {&micro_batch.inputs, &micro_batch.targets, &micro_batch.extras})
    for (const at::Tensor& tensor : *tensors)
      if (tensor.defined() && tensor.dim() > dim) return tensor.size(dim);
  return -1;
}

std::vector<Batch> prepare(const Batch& batch, const BatchUse& use, CallStatement& statement) {
  if (use.trains) check_no_gradients(batch, "Batch::");
  if (batch.empty()) {
    DUALPIPE_CHECK(!use.feeds_inputs && !use.computes_loss, "rank ", use.rank, " got an empty batch, but it ",
                   use.feeds_inputs ? "feeds the inputs" : "computes the loss", " of some micro-batches");
    return {};
  }
  const int count =
      batch.micro_batches.empty() || use.trains ? use.num_micro_batches : static_cast<int>(batch.micro_batches.size());
  // Slices are made where they are used. Every stage sees the extras.
  std::vector<Batch> micro_batches;
  if (use.feeds_inputs || use.computes_loss || use.sizes || !batch.extras.empty() || !batch.micro_batches.empty())
    micro_batches = split_batch(batch, count, use.batch_dim);
  for (std::size_t m = 0; m < micro_batches.size(); ++m)
    for (std::size_t i = 0; i < micro_batches[m].inputs.size(); ++i)
      DUALPIPE_CHECK(micro_batches[m].inputs[i].defined(), "micro-batch ", m, ": Batch::inputs[", i, "] is undefined");

  statement.num_micro_batches = count;
  statement.inputs = batch_part(batch, &Batch::inputs, use.feeds_inputs);
  statement.targets = batch_part(batch, &Batch::targets, use.computes_loss);
  statement.extras = batch_part(batch, &Batch::extras, false);
  if (use.sizes && statement.inputs.passed)
    for (const Batch& micro_batch : micro_batches)
      statement.sizes.push_back(micro_batch_size(micro_batch, use.batch_dim));
  return micro_batches;
}

}  // namespace dualpipe::detail
