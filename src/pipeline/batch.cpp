#include "dualpipe/pipeline/batch.hpp"

#include <string_view>
#include <utility>

namespace dualpipe {
namespace {

void split_tensors(const Tensors& tensors, const char* what, int count, int dim, Tensors Batch::* member,
                   std::vector<Batch>& into) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    DUALPIPE_CHECK(tensor.defined(), "Batch::", what, "[", i, "] is undefined");
    DUALPIPE_CHECK(tensor.dim() > dim, "Batch::", what, "[", i, "] has ", tensor.dim(),
                   " dimensions and cannot be split along dimension ", dim, " (DualPipeOptions::batch_dim)");
    const auto size = tensor.size(dim);
    DUALPIPE_CHECK(size % count == 0, "Batch::", what, "[", i, "] has ", size, " elements along dimension ", dim,
                   ", which ", count, " micro-batches do not divide; pad or drop to a multiple of ", count,
                   ", or make uneven micro-batches by hand with Batch::from_micro_batches");
    const auto slice = size / count;
    for (int m = 0; m < count; ++m) (into[m].*member).push_back(tensor.narrow(dim, m * slice, slice));
  }
}

void mix(std::uint64_t& sum, std::uint64_t value) { sum = (sum ^ value) * 0x9E3779B97F4A7C15ull + (sum >> 29); }

void mix(std::uint64_t& sum, const Tensors& tensors) {
  mix(sum, tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      mix(sum, 1);
      continue;
    }
    mix(sum, static_cast<std::uint64_t>(tensor.scalar_type()));
    for (auto size : tensor.sizes()) mix(sum, static_cast<std::uint64_t>(size));
    const at::Tensor host = tensor.detach().cpu().contiguous();
    mix(sum, std::hash<std::string_view>{}({static_cast<const char*>(host.const_data_ptr()), host.nbytes()}));
  }
}

}  // namespace

Batch Batch::from_micro_batches(std::vector<Batch> micro_batches) {
  DUALPIPE_CHECK(!micro_batches.empty(), "Batch::from_micro_batches got no micro-batch");
  for (std::size_t i = 0; i < micro_batches.size(); ++i)
    DUALPIPE_CHECK(micro_batches[i].micro_batches.empty(), "micro-batch ", i, " is itself made of micro-batches");
  Batch batch;
  batch.micro_batches = std::move(micro_batches);
  return batch;
}

std::vector<Batch> split_batch(const Batch& batch, int count, int dim) {
  if (!batch.micro_batches.empty()) {
    DUALPIPE_CHECK(static_cast<int>(batch.micro_batches.size()) == count, "the batch was made of ",
                   batch.micro_batches.size(), " micro-batches, the step has ", count);
    return batch.micro_batches;
  }
  std::vector<Batch> micro_batches(count);
  split_tensors(batch.inputs, "inputs", count, dim, &Batch::inputs, micro_batches);
  split_tensors(batch.targets, "targets", count, dim, &Batch::targets, micro_batches);
  split_tensors(batch.extras, "extras", count, dim, &Batch::extras, micro_batches);
  return micro_batches;
}

std::uint64_t checksum(const Batch& batch) {
  std::uint64_t sum = 0;
  mix(sum, batch.inputs);
  mix(sum, batch.targets);
  mix(sum, batch.extras);
  for (const Batch& micro_batch : batch.micro_batches) mix(sum, checksum(micro_batch));
  return sum;
}

}  // namespace dualpipe
