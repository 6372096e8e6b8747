#pragma once

#include "dualpipe/detail/pipeline/merge_outputs.hpp"

#include <ATen/ATen.h>

#include <string>
#include <utility>

namespace dualpipe::detail {

std::vector<Tensors> gather_outputs(Communicator& communicator, const Plan& plan, const std::vector<int>& ranks,
                                    std::map<int, Tensors> outputs) {
  const int count = plan.schedule.num_micro_batches;
  std::vector<Pending> sends;
  std::map<int, Pending> receives;
  for (int m = 0; m < count; ++m) {
    const int owner = plan.rank_of(plan.schedule.num_stages - 1, m);
    if (owner != communicator.rank()) {
      receives.emplace(m, communicator.receive(owner));
      continue;
    }
    for (const int other : ranks)
      if (other != communicator.rank()) sends.push_back(communicator.send(other, outputs.at(m)));
  }
  std::vector<Tensors> all(static_cast<std::size_t>(count));
  for (auto& [micro_batch, tensors] : outputs) all[micro_batch] = std::move(tensors);
  for (auto& [micro_batch, pending] : receives) all[micro_batch] = pending.take();
  for (Pending& pending : sends) pending.wait();
  return all;
}

Tensors merge_outputs(const std::vector<Tensors>& outputs, const std::vector<std::int64_t>& sizes, int dim) {
  const std::string way_out =
      "; evaluate() with DualPipeOptions::keep_outputs gives the outputs of each micro-batch as they are";
  if (outputs.size() == 1) return outputs[0];
  Tensors merged;
  for (std::size_t i = 0; i < outputs[0].size(); ++i) {
    Tensors parts;
    for (std::size_t m = 0; m < outputs.size(); ++m) {
      DUALPIPE_CHECK(outputs[m].size() == outputs[0].size(), "predict() cannot merge: micro-batch ", m, " has ",
                     outputs[m].size(), " outputs, micro-batch 0 has ", outputs[0].size(), way_out);
      const at::Tensor& part = outputs[m][i];
      const std::string which = str("predict() cannot merge output ", i, " along dimension ", dim,
                                    " (DualPipeOptions::batch_dim): that of micro-batch ", m);
      DUALPIPE_CHECK(part.defined(), which, " is undefined", way_out);
      DUALPIPE_CHECK(part.dim() > dim, which, " has sizes ", part.sizes(), way_out);
      const std::int64_t size = m < sizes.size() ? sizes[m] : -1;
      DUALPIPE_CHECK(size < 0 || part.size(dim) == size, which, " has sizes ", part.sizes(),
                     ", but the micro-batch has ", size, " samples", way_out);
      const at::Tensor& first = parts.empty() ? part : parts.front();
      bool same = part.dim() == first.dim() && part.scalar_type() == first.scalar_type();
      for (std::int64_t d = 0; same && d < part.dim(); ++d) same = d == dim || part.size(d) == first.size(d);
      DUALPIPE_CHECK(same, which, " is ", to_string(signature_of({part})), ", that of micro-batch 0 ",
                     to_string(signature_of({first})), way_out);
      parts.push_back(part);
    }
    merged.push_back(at::cat(parts, dim));
  }
  return merged;
}

}  // namespace dualpipe::detail
