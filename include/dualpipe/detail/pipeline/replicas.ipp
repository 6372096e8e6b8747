#pragma once

#include "dualpipe/detail/pipeline/replicas.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/pipeline/digest.hpp"

namespace dualpipe::detail {

/// Appends those of `tensors` that were not seen before.
inline void append_new(const Tensors& tensors, std::unordered_set<at::TensorImpl*>& seen, Tensors& into) {
  for (const at::Tensor& tensor : tensors)
    if (tensor.defined() && seen.insert(tensor.unsafeGetTensorImpl()).second) into.push_back(tensor);
}

using HolderSet = std::pair<std::vector<int>, std::vector<int>>;  // ranks, the stages they hold

/// The calling rank's communicator of each set of several ranks that it belongs to. `split` is collective, so every
/// rank goes through all sets in one order; disjoint ones are made by one call, so that their communicators open side
/// by side.
inline std::vector<std::shared_ptr<Communicator>> make_holder_groups(Communicator& communicator,
                                                                     const std::vector<HolderSet>& sets) {
  std::vector<std::shared_ptr<Communicator>> groups(sets.size());
  std::vector<bool> made(sets.size(), false);
  for (std::size_t first = 0; first < sets.size(); ++first) {
    if (made[first] || sets[first].first.size() < 2) continue;
    std::unordered_set<int> taken;
    std::optional<std::size_t> own;
    for (std::size_t i = first; i < sets.size(); ++i) {
      const std::vector<int>& ranks = sets[i].first;
      if (made[i] || ranks.size() < 2 ||
          std::any_of(ranks.begin(), ranks.end(), [&](int r) { return taken.contains(r); }))
        continue;
      made[i] = true;
      taken.insert(ranks.begin(), ranks.end());
      if (std::find(ranks.begin(), ranks.end(), communicator.rank()) != ranks.end()) own = i;
    }
    const auto group = communicator.split(own ? static_cast<int>(*own) : -1, communicator.rank());
    if (own) groups[*own] = group;
  }
  return groups;
}

Tensors unique_parameters(const std::map<int, Stage>& stages) {
  std::unordered_set<at::TensorImpl*> seen;
  Tensors parameters;
  for (const auto& [number, stage] : stages)
    if (stage.module()) append_new(stage.module()->parameters(), seen, parameters);
  return parameters;
}

/// @param set_of  the set of ranks that holds each parameter met so far.
inline void check_not_shared(const Stage& stage, int number, std::size_t set,
                             std::unordered_map<at::TensorImpl*, std::size_t>& set_of) {
  if (!stage.module()) return;
  for (const at::Tensor& parameter : stage.module()->parameters()) {
    const auto [entry, added] = set_of.try_emplace(parameter.unsafeGetTensorImpl(), set);
    DUALPIPE_CHECK(entry->second == set, "stage ", number, " shares a parameter of shape ", parameter.sizes(),
                   " with a stage that other ranks hold; only stages held by the same ranks can share parameters");
  }
}

Replicas::Replicas(Communicator& communicator, const Schedule& schedule, const std::map<int, Stage>& stages) {
  std::vector<HolderSet> sets;
  for (int stage = 0; stage < schedule.num_stages; ++stage) {
    const std::vector<int> ranks = holders(schedule, stage);
    auto same = std::find_if(sets.begin(), sets.end(), [&](const auto& set) { return set.first == ranks; });
    if (same == sets.end()) same = sets.insert(sets.end(), {ranks, {}});
    same->second.push_back(stage);
  }

  const auto member = [&](const std::vector<int>& ranks) {
    return std::find(ranks.begin(), ranks.end(), communicator.rank()) != ranks.end();
  };
  agree_that_fine(communicator, finding_of([&] {
                    std::unordered_map<at::TensorImpl*, std::size_t> set_of;
                    for (std::size_t i = 0; i < sets.size(); ++i) {
                      if (!member(sets[i].first)) continue;
                      for (const int number : sets[i].second) check_not_shared(stages.at(number), number, i, set_of);
                    }
                  }));

  std::vector<std::shared_ptr<Communicator>> groups = make_holder_groups(communicator, sets);
  std::unordered_set<at::TensorImpl*> seen_parameters, seen_buffers;
  for (std::size_t i = 0; i < sets.size(); ++i) {
    const auto& [ranks, numbers] = sets[i];
    if (!member(ranks)) continue;
    Group mine{static_cast<int>(i), std::move(groups[i]), {}, {}};
    for (const int number : numbers) {
      const auto& module = stages.at(number).module();
      if (!module) continue;
      append_new(module->parameters(), seen_parameters, mine.parameters);
      append_new(module->buffers(), seen_buffers, mine.buffers);
    }
    if (communicator.rank() == ranks.front())
      counted_.insert(counted_.end(), mine.parameters.begin(), mine.parameters.end());
    if (ranks.size() > 1) groups_.push_back(std::move(mine));
  }
}

std::map<int, std::uint64_t> Replicas::trainable() const {
  std::map<int, std::uint64_t> digests;
  for (const Group& group : groups_) {
    Digest digest;
    for (const at::Tensor& parameter : group.parameters) digest.add(std::uint64_t{parameter.requires_grad()});
    digests[group.number] = digest.value();
  }
  return digests;
}

void Replicas::sum_gradients() {
  std::vector<Pending> pending;
  std::vector<Tensors> trained;     // per group: its parameters that require grad
  std::vector<at::Tensor> present;  // per group: on how many holders each of them has a gradient
  for (Group& group : groups_) {
    Tensors parameters;
    for (const at::Tensor& parameter : group.parameters)
      if (parameter.requires_grad()) parameters.push_back(parameter);
    at::Tensor count = at::zeros({static_cast<std::int64_t>(parameters.size())}, at::kInt);
    Tensors gradients;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      at::Tensor& gradient = parameters[i].mutable_grad();
      count.mutable_data_ptr<int>()[i] = gradient.defined() ? 1 : 0;
      if (!gradient.defined())
        gradient = at::zeros_like(parameters[i], at::MemoryFormat::Contiguous);
      else if (gradient.is_sparse())
        gradient = gradient.to_dense();
      else
        gradient = gradient.contiguous();
      gradients.push_back(gradient);
    }
    present.push_back(count);
    trained.push_back(std::move(parameters));
    if (gradients.empty()) continue;
    Communicator& hosts = group.communicator->control();
    if (&hosts == group.communicator.get())
      gradients.push_back(count);  // no message of its own
    else
      pending.push_back(hosts.all_reduce({count}));
    pending.push_back(group.communicator->all_reduce(std::move(gradients)));
  }
  for (Pending& each : pending) each.wait();
  for (std::size_t g = 0; g < trained.size(); ++g)
    for (std::size_t i = 0; i < trained[g].size(); ++i)
      if (present[g].const_data_ptr<int>()[i] == 0) trained[g][i].mutable_grad().reset();
}

void Replicas::broadcast() {
  at::NoGradGuard no_grad;
  std::vector<Pending> pending;
  for (Group& group : groups_) {
    Tensors tensors;
    for (const at::Tensor& parameter : group.parameters) tensors.push_back(parameter.detach());
    for (const at::Tensor& buffer : group.buffers) tensors.push_back(buffer.detach());
    pending.push_back(group.communicator->broadcast(std::move(tensors), 0));
  }
  for (Pending& each : pending) each.synchronize();  // parameters are right when this returns, or it throws
}

void Replicas::broadcast_buffers() {
  at::NoGradGuard no_grad;
  std::vector<Pending> pending;
  for (Group& group : groups_) {
    Tensors tensors;
    for (const at::Tensor& buffer : group.buffers)
      if (buffer.is_floating_point()) tensors.push_back(buffer.detach());
    if (!tensors.empty()) pending.push_back(group.communicator->broadcast(std::move(tensors), 0));
  }
  for (Pending& each : pending) each.wait();
}

}  // namespace dualpipe::detail
