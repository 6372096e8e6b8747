#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/pipeline/store.hpp"
#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/stage/shared_memory.hpp"

namespace dualpipe::detail {

/// What one rank has computed or received and has not used or sent yet. It makes no difference whether producer and
/// consumer are on this rank or on another.
using Mailbox = Store<StageResult, Tensors>;

inline StageResult result_of(const Transfer& transfer) {
  return {transfer.payload, transfer.stage, transfer.micro_batch};
}

// Behind the activations may stand tensors without elements whose sizes say which activations share memory: one of sizes
// 0, first, second for each pair, and at the end one of sizes 0, number of activations, number of pairs.

inline bool tells_shared(const Tensors& tensors) {
  if (tensors.empty() || !tensors.back().defined()) return false;
  const at::Tensor& last = tensors.back();
  return last.scalar_type() == at::kByte && last.dim() == 3 && last.size(0) == 0 &&
         last.size(1) + last.size(2) + 1 == static_cast<std::int64_t>(tensors.size());
}

/// @param activations  the outputs of a stage.
inline void add_shared(Tensors& activations, const SharedPairs& shared) {
  if (shared.empty() && !tells_shared(activations)) return;
  const auto count = static_cast<std::int64_t>(activations.size());
  const auto device = activations[shared.empty() ? activations.size() - 1 : shared.front().first].device();
  const auto add = [&](std::int64_t first, std::int64_t second) {
    activations.push_back(at::empty({0, first, second}, at::device(device).dtype(at::kByte)));
  };
  for (const auto& [first, second] : shared) add(first, second);
  add(count, static_cast<std::int64_t>(shared.size()));
}

/// The reverse.
inline SharedPairs take_shared(Tensors& activations) {
  SharedPairs shared;
  if (!tells_shared(activations)) return shared;
  const auto count = static_cast<std::size_t>(activations.back().size(1));
  for (std::size_t i = count; i + 1 < activations.size(); ++i)
    shared.emplace_back(static_cast<int>(activations[i].size(1)), static_cast<int>(activations[i].size(2)));
  activations.resize(count);
  return shared;
}

}  // namespace dualpipe::detail
