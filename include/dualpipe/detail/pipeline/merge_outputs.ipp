#pragma once

#include "dualpipe/detail/pipeline/merge_outputs.hpp"

#include <ATen/ATen.h>

#include <string>
#include <utility>

namespace dualpipe::detail {

std::vector<Tensors> gather_from(Communicator& communicator, const Plan& plan, int stage, const std::vector<int>& ranks,
                                 std::map<int, Tensors> mine) {
  const int count = plan.schedule.num_micro_batches;
  std::vector<Pending> sends;
  std::map<int, Pending> receives;
  for (int m = 0; m < count; ++m) {
    const int owner = plan.rank_of(stage, m);
    if (owner != communicator.rank()) {
      receives.emplace(m, communicator.receive(owner));
      continue;
    }
    for (const int other : ranks)
      if (other != communicator.rank()) sends.push_back(communicator.send(other, mine[m]));
  }
  std::vector<Tensors> all(count);
  for (auto& [micro_batch, tensors] : mine) all[micro_batch] = std::move(tensors);
  for (auto& [micro_batch, pending] : receives) all[micro_batch] = pending.take();
  for (Pending& pending : sends) pending.wait();
  return all;
}

std::string merge_text(const Merge& merge) {
  if (merge.how == Merge::How::list) return "list";
  return str(merge.how == Merge::How::stack ? "stack" : "concat", " along dimension ", merge.dim);
}

inline constexpr const char* ways_to_merge =
    "; DualPipeOptions::merge_outputs sets how each output merges (concat along its own dimension, stack, list), and "
    "evaluate() with DualPipeOptions::keep_outputs gives the outputs of each micro-batch as they are";

/// Output `number` of all micro-batches by concat or stack.
inline at::Tensor merged_output(std::size_t number, const Tensors& parts, const std::vector<std::int64_t>& sizes,
                                const Merge& merge) {
  const bool stacks = merge.how == Merge::How::stack;
  for (std::size_t m = 0; m < parts.size(); ++m) {
    const at::Tensor& part = parts[m];
    const at::Tensor& first = parts[0];
    const std::string which =
        str("predict() cannot merge output ", number, " by ", merge_text(merge), ": that of micro-batch ", m);
    DUALPIPE_CHECK(part.defined(), which, " is undefined", ways_to_merge);
    DUALPIPE_CHECK(part.dim() + (stacks ? 1 : 0) > merge.dim, which, " has sizes ", part.sizes(), ways_to_merge);
    DUALPIPE_CHECK(m >= sizes.size() || sizes[m] < 0 || part.size(merge.dim) == sizes[m], which, " has sizes ",
                   part.sizes(), ", but the micro-batch has ", sizes[m], " samples", ways_to_merge);
    bool same = part.dim() == first.dim() && part.scalar_type() == first.scalar_type();
    for (std::int64_t d = 0; same && d < part.dim(); ++d)
      same = part.size(d) == first.size(d) || (!stacks && d == merge.dim);
    DUALPIPE_CHECK(same, which, " is ", to_string(signature_of({part})), ", that of micro-batch 0 ",
                   to_string(signature_of({first})), ways_to_merge);
  }
  return stacks ? at::stack(parts, merge.dim) : at::cat(parts, merge.dim);
}

Tensors merge_outputs(const std::vector<Tensors>& outputs, const std::vector<std::int64_t>& sizes,
                      const DualPipeOptions& options) {
  const std::size_t count = outputs[0].size();
  const std::vector<Merge>& merges = options.merge_outputs;
  DUALPIPE_CHECK(merges.empty() || merges.size() == count, "DualPipeOptions::merge_outputs has ", merges.size(),
                 " entries, but the last stage has ", count, " outputs; give one for each of them, or none");
  if (merges.empty() && outputs.size() == 1) return outputs[0];
  for (std::size_t m = 0; m < outputs.size(); ++m)
    DUALPIPE_CHECK(outputs[m].size() == count, "predict() cannot merge: micro-batch ", m, " has ", outputs[m].size(),
                   " outputs, micro-batch 0 has ", count, ways_to_merge);
  Tensors merged;
  for (std::size_t i = 0; i < count; ++i) {
    Tensors parts;
    for (const Tensors& each : outputs) parts.push_back(each[i]);
    if (merges.empty()) {
      merged.push_back(merged_output(i, parts, sizes, {.dim = options.batch_dim}));
    } else if (merges[i].how == Merge::How::list) {
      merged.insert(merged.end(), parts.begin(), parts.end());
    } else {
      merged.push_back(merged_output(i, parts, {}, merges[i]));
    }
  }
  return merged;
}

}  // namespace dualpipe::detail
