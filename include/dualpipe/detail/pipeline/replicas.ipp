#pragma once

#include "dualpipe/detail/pipeline/replicas.hpp"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <optional>
#include <sstream>
#include <unordered_set>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/host.hpp"
#include "dualpipe/detail/pipeline/device_hash.hpp"
#include "dualpipe/detail/pipeline/digest.hpp"

namespace dualpipe::detail {

/// Appends those of `tensors` that were not seen before.
inline void append_new(const torch::OrderedDict<std::string, at::Tensor>& tensors,
                       std::unordered_set<at::TensorImpl*>& seen, Tensors& into, std::vector<std::string>& names,
                       const char* what, int stage) {
  for (const auto& item : tensors) {
    if (!item.value().defined() || !seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
    into.push_back(item.value());
    names.push_back(str(what, " '", item.key(), "' of stage ", stage));
  }
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
  std::vector<std::string> names;
  for (const auto& [number, stage] : stages)
    if (stage.module()) append_new(stage.module()->named_parameters(), seen, parameters, names, "parameter", number);
  return parameters;
}

/// Of type, sizes and values. Those of a device are hashed there.
inline std::uint64_t digest_of(const at::Tensor& tensor) {
  Digest digest;
  digest.add_values({tensor});
  if (tensor.defined() && !tensor.is_cpu())
    digest.add(static_cast<std::uint64_t>(device_hash(tensor).item<std::int64_t>()));
  return digest.value();
}

/// As for a parameter that begins with one value throughout: such ones are equal without having to do with each other.
constexpr std::uint64_t no_digest = 0;

inline std::uint64_t digest_of_start(const at::Tensor& parameter) {
  const at::Tensor flat = parameter.detach().flatten();
  return flat.numel() < 2 || flat.eq(flat[0]).all().item<bool>() ? no_digest : digest_of(parameter);
}

/// A parameter, as all ranks hear of it.
struct ParameterPlace {
  int rank = 0;
  int stage = 0;
  std::string address;  ///< with the process: ranks that are threads see what they share
  std::uint64_t digest = no_digest;
  std::string name;
};

/// The process, and a line for each parameter.
inline std::string parameters_text(const std::map<int, Stage>& stages) {
  const at::NoGradGuard no_grad;
  std::string text = str(boot_id(), '-', ::getpid(), '\n');
  for (const auto& [number, stage] : stages) {
    if (!stage.module()) continue;
    for (const auto& item : stage.module()->named_parameters())
      if (item.value().defined() && item.value().has_storage() && item.value().numel() > 0)
        text +=
            str(number, ' ', item.value().const_data_ptr(), ' ', digest_of_start(item.value()), ' ', item.key(), '\n');
  }
  return text;
}

/// @param texts  of all ranks.
inline std::vector<ParameterPlace> parameter_places(const std::vector<std::string>& texts) {
  std::vector<ParameterPlace> places;
  for (int rank = 0; rank < std::ssize(texts); ++rank) {
    std::istringstream lines(texts[rank]);
    std::string process;
    std::getline(lines, process);
    ParameterPlace place{.rank = rank, .address = {}, .name = {}};
    while (lines >> place.stage >> place.address >> place.digest && std::getline(lines >> std::ws, place.name)) {
      place.address = process + ' ' + place.address;
      places.push_back(place);
    }
  }
  return places;
}

inline constexpr const char* ways_to_tie =
    "Kinds dualpipe, dualpipev and zbv keep the first and the last stage on the same ranks; else let the first of the "
    "stages return the weight with its outputs, and those between hand it on";

inline void check_not_shared(const std::vector<ParameterPlace>& places, const Schedule& schedule) {
  std::map<std::string, ParameterPlace> first_places;  // by address
  for (const ParameterPlace& place : places) {
    const ParameterPlace& first = first_places.try_emplace(place.address, place).first->second;
    DUALPIPE_CHECK(holders(schedule, place.stage) == holders(schedule, first.stage), "stages ", first.stage, " and ",
                   place.stage, " share a parameter, '", first.name, "' of the one and '", place.name,
                   "' of the other, but different ranks hold them, and each would train its own copy. ", ways_to_tie);
    DUALPIPE_CHECK(place.rank == first.rank, "ranks ", first.rank, " and ", place.rank,
                   " are threads of one process, and parameter '", place.name, "' of stage ", place.stage,
                   " is the same tensor for both, which would train it at the same time; let the stage factory make a "
                   "module of its own each time it is called");
  }
}

/// In processes of their own, tied stages look like stages that were seeded alike. Both are worth a word.
inline void warn_of_equal(const std::vector<ParameterPlace>& places, const Schedule& schedule) {
  std::map<std::pair<std::string, std::uint64_t>, int> first_stages;  // by name and digest
  for (const ParameterPlace& place : places) {
    if (place.digest == no_digest) continue;
    const int first = first_stages.try_emplace({place.name, place.digest}, place.stage).first->second;
    if (holders(schedule, place.stage) == holders(schedule, first)) continue;
    TORCH_WARN("stages ", first, " and ", place.stage, " begin with equal values of a parameter of the same name, '",
               place.name,
               "', and different ranks hold them. If they were seeded alike: seed each stage by its number. If "
               "it is one weight that both use: each will train its own copy. ",
               ways_to_tie, ". This is said once");
    return;
  }
}

inline std::uint32_t version_of(const at::Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

Replicas::Replicas(Communicator& communicator, const Schedule& schedule, const std::map<int, Stage>& stages)
    : communicator_(communicator) {
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
  const auto places = parameter_places(all_gather_text(communicator, parameters_text(stages)));
  check_not_shared(places, schedule);
  if (communicator.rank() == 0) warn_of_equal(places, schedule);

  std::vector<std::shared_ptr<Communicator>> groups = make_holder_groups(communicator, sets);
  std::unordered_set<at::TensorImpl*> seen_parameters, seen_buffers;
  for (std::size_t i = 0; i < sets.size(); ++i) {
    const auto& [ranks, numbers] = sets[i];
    if (!member(ranks)) continue;
    Group mine{static_cast<int>(i), std::move(groups[i]), {}, {}, {}};
    for (const int number : numbers)
      if (const auto& module = stages.at(number).module())
        append_new(module->named_parameters(), seen_parameters, mine.parameters, mine.names, "parameter", number);
    for (const int number : numbers)
      if (const auto& module = stages.at(number).module())
        append_new(module->named_buffers(), seen_buffers, mine.buffers, mine.names, "buffer", number);
    if (communicator.rank() == ranks.front())
      counted_.insert(counted_.end(), mine.parameters.begin(), mine.parameters.end());
    if (ranks.size() > 1) groups_.push_back(std::move(mine));
  }
  any_copies_ = std::any_of(sets.begin(), sets.end(), [](const HolderSet& set) { return set.first.size() > 1; });
  if (!any_copies_) return;
  const bool buffers =
      std::any_of(groups_.begin(), groups_.end(), [](const Group& group) { return !group.buffers.empty(); });
  for (const std::string& text : all_gather_text(communicator, buffers ? "buffers" : ""))
    watches_buffers_ = watches_buffers_ || !text.empty();
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
  if (watches_buffers_) warn_of_lost_buffers();
  at::NoGradGuard no_grad;
  std::vector<Pending> pending;
  for (Group& group : groups_) {
    Tensors tensors;
    for (const at::Tensor& buffer : group.buffers)
      if (buffer.is_floating_point()) tensors.push_back(buffer.detach());
    if (!tensors.empty()) pending.push_back(group.communicator->broadcast(std::move(tensors), 0));
  }
  for (Pending& each : pending) each.wait();
  if (!watches_buffers_) return;
  versions_.clear();
  for (const Group& group : groups_)
    for (const at::Tensor& buffer : group.buffers) versions_.push_back(version_of(buffer));
}

std::vector<Replicas::Difference> Replicas::differences(
    const std::map<int, std::vector<std::uint64_t>>& digests) const {
  std::vector<std::int64_t> mine;
  for (const auto& [group, values] : digests) {
    mine.insert(mine.end(), {group, static_cast<std::int64_t>(values.size())});
    mine.insert(mine.end(), values.begin(), values.end());
  }
  std::map<int, std::pair<int, std::vector<std::int64_t>>> first;  // by group: its first rank, and the digests there
  std::map<std::pair<int, std::size_t>, Difference> found;         // by group and tensor
  const Tensors all = communicator_.control().all_gather(at::tensor(mine, at::kLong)).take();
  for (int rank = 0; rank < static_cast<int>(all.size()); ++rank) {
    const auto* next = all[rank].const_data_ptr<std::int64_t>();
    const auto* const end = next + all[rank].numel();
    while (next != end) {
      const int group = static_cast<int>(*next++);
      const std::vector<std::int64_t> values(next + 1, next + 1 + *next);
      next += 1 + *next;
      const auto& [other, expected] = first.try_emplace(group, rank, values).first->second;
      for (std::size_t i = 0; i < std::min(values.size(), expected.size()); ++i)
        if (values[i] != expected[i]) found.try_emplace({group, i}, Difference{group, i, other, rank});
    }
  }
  std::vector<Difference> result;
  for (const auto& [place, difference] : found) result.push_back(difference);
  return result;
}

std::string Replicas::text_of(const std::vector<Difference>& differences) const {
  std::string mine;
  for (const Difference& each : differences) {
    if (each.rank != communicator_.rank()) continue;
    for (const Group& group : groups_)
      if (group.number == each.group)
        mine += str(mine.empty() ? "" : ", ", group.names[each.tensor], " on ranks ",
                    communicator_.world_rank(each.rank), " and ", communicator_.world_rank(each.other));
  }
  std::string text;
  for (const std::string& part : all_gather_text(communicator_, mine))
    if (!part.empty()) text += (text.empty() ? "" : ", ") + part;
  return text;
}

std::string Replicas::difference() const {
  if (!any_copies_) return {};
  std::map<int, std::vector<std::uint64_t>> digests;
  for (const Group& group : groups_)
    for (const Tensors* tensors : {&group.parameters, &group.buffers})
      for (const at::Tensor& tensor : *tensors) digests[group.number].push_back(digest_of(tensor));
  const std::vector<Difference> found = differences(digests);
  if (found.empty()) return {};
  return str(
      text_of({found.front()}),
      ", which hold the same stage, is not the same bit by bit: something changes it on each rank by itself, as "
      "max_norm of an embedding, noise, or a counter in a buffer does, or weights were loaded on some ranks only. "
      "broadcast_parameters() makes all copies equal; DualPipeOptions::compare_replicas_every says how often they "
      "are compared (0: never)");
}

void Replicas::warn_of_lost_buffers() {
  std::map<int, std::vector<std::uint64_t>> digests;
  std::size_t next = 0;
  for (const Group& group : groups_) {
    std::vector<std::uint64_t>& values = digests[group.number];
    values.assign(group.parameters.size(), 0);
    for (const at::Tensor& buffer : group.buffers) {
      const bool unchanged = next < versions_.size() && versions_[next] == version_of(buffer);
      values.push_back(unchanged ? 0 : digest_of(buffer));
      ++next;
    }
  }
  const std::vector<Difference> found = differences(digests);
  if (found.empty()) return;
  watches_buffers_ = false;
  const std::string text = text_of(found);
  if (communicator_.rank() == 0) {
    TORCH_WARN(
        "ranks that hold the same stage have changed its buffers in different ways, each by its own micro-batches: ",
        text,
        ". After each step floating-point buffers of the first rank replace the others, so running "
        "statistics, as those of BatchNorm, come from a part of the batch. Layers without them (GroupNorm, "
        "LayerNorm) do not have this problem, nor have kinds that keep each stage on one rank (dualpipev, zbv, "
        "1f1b). This is said once");
  }
}

}  // namespace dualpipe::detail
