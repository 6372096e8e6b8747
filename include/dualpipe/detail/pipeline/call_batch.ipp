#pragma once

#include "dualpipe/detail/pipeline/call_batch.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <string>
#include <utility>

#include "dualpipe/detail/pipeline/digest.hpp"

namespace dualpipe::detail {

/// A member of a batch, of the whole one or of all of its micro-batches.
///
/// @param trains  gradients may be asked for.
inline CallStatement::Part batch_part(const Batch& batch, Tensors Batch::* member, bool needed, bool trains) {
  CallStatement::Part part{.needed = needed, .passed = !(batch.*member).empty()};
  for (const Batch& micro_batch : batch.micro_batches) part.passed = part.passed || !(micro_batch.*member).empty();
  if (!part.passed) return part;
  Digest digest;
  const auto add = [&](const Tensors& tensors) {
    digest.add_values(tensors);
    for (const at::Tensor& tensor : tensors)
      if (trains) digest.add(std::uint64_t{tensor.defined() && tensor.requires_grad()});
  };
  add(batch.*member);
  for (const Batch& micro_batch : batch.micro_batches) add(micro_batch.*member);
  part.digest = digest.value();
  return part;
}

inline void check_no_gradient(const Tensors& tensors, const std::string& name) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    DUALPIPE_CHECK(!tensors[i].defined() || !tensors[i].requires_grad(), name, "[", i,
                   "] requires grad, but only inputs have gradients: what computes it would not be trained; pass "
                   "detach(), or let a stage compute it");
}

/// Gradients of inputs are handed out, and flow nowhere else.
inline void check_gradients_end(const Batch& batch, const std::string& name) {
  for (std::size_t i = 0; i < batch.inputs.size(); ++i)
    DUALPIPE_CHECK(!batch.inputs[i].defined() || !batch.inputs[i].requires_grad() || batch.inputs[i].is_leaf(), name,
                   "inputs[", i,
                   "] requires grad and was computed, but gradients end at the batch: what computes it would not be "
                   "trained; pass detach(), let a stage compute it, or pass detach().requires_grad_() and hand "
                   "StepResult::input_gradients to its backward()");
  check_no_gradient(batch.targets, name + "targets");
  check_no_gradient(batch.extras, name + "extras");
  for (std::size_t m = 0; m < batch.micro_batches.size(); ++m)
    check_gradients_end(batch.micro_batches[m], str("micro-batch ", m, ": Batch::"));
}

/// How many samples a micro-batch has; -1 where no tensor tells.
inline std::int64_t micro_batch_size(const Batch& micro_batch, const BatchUse& use) {
  const auto size_of = [&](const Tensors& tensors, const std::vector<Split>& given) -> std::int64_t {
    const std::vector<Split> splits = splits_of(tensors, given, use.batch_dim);
    for (std::size_t i = 0; i < tensors.size() && i < splits.size(); ++i)
      if (splits[i].how == Split::How::chunk && tensors[i].defined() && tensors[i].dim() > splits[i].dim)
        return tensors[i].size(splits[i].dim);
    return -1;
  };
  std::int64_t size = size_of(micro_batch.inputs, use.split.inputs);
  if (size < 0) size = size_of(micro_batch.targets, use.split.targets);
  return size < 0 ? size_of(micro_batch.extras, use.split.extras) : size;
}

std::vector<Batch> prepare(const Batch& batch, const BatchUse& use, CallStatement& statement) {
  if (use.trains) check_gradients_end(batch, "Batch::");
  for (std::size_t m = 0; m < batch.weights.size(); ++m)
    DUALPIPE_CHECK(std::isfinite(batch.weights[m]) && batch.weights[m] >= 0, "Batch::weights[", m, "] is ",
                   batch.weights[m], "; a weight is a finite number that is not negative");
  statement.weights = batch.weights;
  if (batch.empty()) {
    DUALPIPE_CHECK(!use.feeds_inputs && !use.computes_loss, "rank ", use.rank, " got an empty batch, but it ",
                   use.feeds_inputs ? "feeds the inputs" : "computes the loss", " of some micro-batches");
    return {};
  }
  const int count = batch.micro_batches.empty() ? use.num_micro_batches : static_cast<int>(batch.micro_batches.size());
  // Slices are made where they are used. Every stage sees the extras.
  std::vector<Batch> micro_batches;
  if (use.feeds_inputs || use.computes_loss || use.sizes || !batch.extras.empty() || !batch.micro_batches.empty())
    micro_batches = split_batch(batch, count, use.batch_dim, use.split);
  for (std::size_t m = 0; m < micro_batches.size(); ++m)
    for (std::size_t i = 0; i < micro_batches[m].inputs.size(); ++i)
      DUALPIPE_CHECK(micro_batches[m].inputs[i].defined(), "micro-batch ", m, ": Batch::inputs[", i, "] is undefined");

  statement.num_micro_batches = count;
  statement.inputs = batch_part(batch, &Batch::inputs, use.feeds_inputs, use.trains);
  statement.targets = batch_part(batch, &Batch::targets, use.computes_loss, use.trains);
  statement.extras = batch_part(batch, &Batch::extras, false, use.trains);
  if (use.sizes && statement.inputs.passed)
    for (const Batch& micro_batch : micro_batches) statement.sizes.push_back(micro_batch_size(micro_batch, use));
  return micro_batches;
}

bool wants_input_gradients(const std::vector<Batch>& micro_batches) {
  return std::any_of(micro_batches.begin(), micro_batches.end(), [](const Batch& micro_batch) {
    return std::any_of(micro_batch.inputs.begin(), micro_batch.inputs.end(),
                       [](const at::Tensor& input) { return input.requires_grad(); });
  });
}

Tensors input_gradients(const Batch& batch, const std::vector<Batch>& micro_batches,
                        const std::vector<Tensors>& gradients, const DualPipeOptions& options) {
  const at::NoGradGuard no_grad;
  std::vector<Tensors> of_inputs(micro_batches.size());
  for (std::size_t m = 0; m < micro_batches.size(); ++m) {
    std::size_t next = 0;
    for (const at::Tensor& input : micro_batches[m].inputs)
      of_inputs[m].push_back(input.requires_grad() ? gradients[m].at(next++) : at::Tensor());
  }
  if (!batch.micro_batches.empty()) {
    Tensors all;
    for (const Tensors& each : of_inputs) all.insert(all.end(), each.begin(), each.end());
    return all;
  }
  Tensors all(batch.inputs.size());
  std::size_t input = 0;
  const std::vector<Split> splits = splits_of(batch.inputs, options.split.inputs, options.batch_dim);
  for_each_split(
      batch.inputs, splits, "inputs", static_cast<int>(micro_batches.size()), [&](std::size_t at, const Split& split) {
        Tensors parts;
        for (const Tensors& each : of_inputs) parts.push_back(each[input]);
        ++input;
        if (split.how == Split::How::list) {
          std::copy(parts.begin(), parts.end(), all.begin() + static_cast<std::ptrdiff_t>(at));
        } else if (parts[0].defined()) {
          all[at] = split.how == Split::How::chunk
                        ? at::cat(parts, split.dim)
                        : std::accumulate(parts.begin() + 1, parts.end(), parts[0].clone(),
                                          [](at::Tensor sum, const at::Tensor& part) { return sum.add_(part); });
        }
      });
  return all;
}

Batch sent_batch(Communicator& pipeline, const Batch& batch, const std::vector<int>& feeding,
                 const std::vector<int>& losing) {
  // A message: the numbers of tensors of each micro-batch, those of the whole batch last; the weights; the tensors.
  Communicator& hosts = pipeline.control();
  constexpr std::array<Tensors Batch::*, 3> members = {&Batch::inputs, &Batch::targets, &Batch::extras};
  if (pipeline.rank() == 0) {
    std::vector<Pending> sends;
    for (int rank = 1; rank < pipeline.size(); ++rank) {
      const auto is_in = [&](const std::vector<int>& ranks) {
        return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
      };
      const std::array<bool, 3> needed{is_in(feeding), is_in(losing), true};
      std::vector<std::int64_t> counts;
      Tensors message(2);
      const auto add = [&](const Batch& part) {
        for (std::size_t i = 0; i < members.size(); ++i) {
          const Tensors& tensors = part.*members[i];
          counts.push_back(needed[i] ? std::ssize(tensors) : 0);
          for (std::size_t t = 0; needed[i] && t < tensors.size(); ++t)
            message.push_back(tensors[t].defined()
                                  ? tensors[t].detach().cpu().set_requires_grad(tensors[t].requires_grad())
                                  : tensors[t]);
        }
      };
      for (const Batch& micro_batch : batch.micro_batches) add(micro_batch);
      add(batch);
      message[0] = at::tensor(counts, at::kLong);
      message[1] = at::tensor(batch.weights, at::kDouble);
      sends.push_back(hosts.send(rank, std::move(message)));
    }
    for (Pending& each : sends) each.wait();
    return batch;
  }
  const Tensors message = hosts.receive(0).take();
  Batch mine;
  std::size_t next = 2;
  for (std::int64_t at = 0; at < message[0].numel(); at += std::ssize(members)) {
    Batch& part = at + std::ssize(members) < message[0].numel() ? mine.micro_batches.emplace_back() : mine;
    for (std::size_t i = 0; i < members.size(); ++i)
      for (auto left = message[0].const_data_ptr<std::int64_t>()[at + static_cast<std::int64_t>(i)]; left > 0; --left)
        (part.*members[i]).push_back(message[next++]);
  }
  const double* const weights = message[1].const_data_ptr<double>();
  mine.weights.assign(weights, weights + message[1].numel());
  return mine;
}

}  // namespace dualpipe::detail
