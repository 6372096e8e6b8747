#pragma once

#include "dualpipe/detail/pipeline/replicas.hpp"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/host.hpp"
#include "dualpipe/detail/pipeline/device_hash.hpp"
#include "dualpipe/detail/pipeline/digest.hpp"
#include "dualpipe/detail/pipeline/gradients.hpp"

namespace dualpipe::detail {

/// Appends those of `tensors` that were not seen before and that `wanted` takes by their names.
template <class Wanted>
void append_new(const torch::OrderedDict<std::string, at::Tensor>& tensors, std::unordered_set<at::TensorImpl*>& seen,
                Tensors& into, std::vector<std::string>& names, const char* what, int stage, const Wanted& wanted) {
  for (const auto& item : tensors) {
    if (!item.value().defined() || !wanted(item.key()) || !seen.insert(item.value().unsafeGetTensorImpl()).second)
      continue;
    into.push_back(item.value());
    names.push_back(str(what, " '", item.key(), "' of stage ", stage));
  }
}

/// Ranks of the world that hold the same.
struct HolderSet {
  std::vector<int> ranks;             ///< ascending
  std::vector<int> stages;            ///< that they hold
  bool experts = false;               ///< of these stages the parameters of experts, else the others
  std::vector<const Tie*> ties = {};  ///< that they hold, in place of stages
};

/// All sets, the same on every rank. The stages of one pipeline that the same places hold form one set, which all ranks
/// at these places share. Where experts are told apart there is one more for each part of the experts.
inline std::vector<HolderSet> holder_sets(const Schedule& schedule, const MeshShape& shape, bool tells_experts) {
  std::vector<std::pair<std::vector<int>, std::vector<int>>> by_places;  // places, stages
  const std::vector<std::vector<int>> held = holders(schedule);
  for (int stage = 0; stage < schedule.num_stages; ++stage) {
    const std::vector<int>& places = held[stage];
    auto same =
        std::find_if(by_places.begin(), by_places.end(), [&](const auto& each) { return each.first == places; });
    if (same == by_places.end()) same = by_places.insert(by_places.end(), {places, {}});
    same->second.push_back(stage);
  }
  std::vector<HolderSet> sets;
  for (const auto& [places, stages] : by_places) {
    const auto add = [&, &of_places = places, &of_stages = stages](bool experts, int first, int step) {
      HolderSet set{{}, of_stages, experts};
      for (const int place : of_places)
        for (int replica = first; replica < shape.data; replica += step)
          set.ranks.push_back(shape.rank_of(place, replica));
      std::sort(set.ranks.begin(), set.ranks.end());
      sets.push_back(std::move(set));
    };
    add(false, 0, 1);
    for (int part = 0; tells_experts && part < shape.expert; ++part) add(true, part, shape.expert);
  }
  return sets;
}

/// Behind the others: one for each set of ranks that hold the stages of a tie.
inline void add_tied_sets(const Ties& ties, std::vector<HolderSet>& sets) {
  std::map<std::vector<int>, std::vector<const Tie*>> by_ranks;
  for (const Tie& tie : ties.all()) by_ranks[tie.ranks].push_back(&tie);
  for (auto& [ranks, tied] : by_ranks) sets.push_back({.ranks = ranks, .stages = {}, .ties = std::move(tied)});
}

/// The calling rank's communicator of each set of several ranks that it belongs to. `split` is collective, so every
/// rank goes through all sets in one order; disjoint ones are made by one call, so that their communicators open side
/// by side.
inline std::vector<std::shared_ptr<Communicator>> make_holder_groups(Communicator& world,
                                                                     const std::vector<HolderSet>& sets, bool shards) {
  std::vector<std::shared_ptr<Communicator>> groups(sets.size());
  std::vector<bool> made(sets.size(), false);
  for (std::size_t first = 0; first < sets.size(); ++first) {
    if (made[first] || sets[first].ranks.size() < 2) continue;
    std::unordered_set<int> taken;
    std::optional<std::size_t> own;
    for (std::size_t i = first; i < sets.size(); ++i) {
      const std::vector<int>& ranks = sets[i].ranks;
      if (made[i] || ranks.size() < 2 ||
          std::any_of(ranks.begin(), ranks.end(), [&](int r) { return taken.contains(r); }))
        continue;
      made[i] = true;
      taken.insert(ranks.begin(), ranks.end());
      if (std::find(ranks.begin(), ranks.end(), world.rank()) != ranks.end()) own = i;
    }
    const auto group =
        world.split_for({.exchanges = shards, .sums = true}, own ? static_cast<int>(*own) : -1, world.rank());
    if (own) groups[*own] = group;
  }
  return groups;
}

Tensors unique_parameters(const std::map<int, Stage>& stages) {
  std::unordered_set<at::TensorImpl*> seen;
  Tensors parameters;
  std::vector<std::string> names;
  for (const auto& [number, stage] : stages)
    if (stage.module())
      append_new(stage.module()->named_parameters(), seen, parameters, names, "parameter", number,
                 [](const std::string&) { return true; });
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
  bool is_used = false;  ///< one that Stage::uses() names: its name is that of the whole model
  std::string name;
};

/// The process, and a line for each parameter.
inline std::string parameters_text(const std::map<int, Stage>& stages) {
  const at::NoGradGuard no_grad;
  std::string text = process_identity() + '\n';
  for (const auto& [number, stage] : stages) {
    if (!stage.module()) continue;
    const auto& used = stage.used_parts();
    const bool is_used = std::any_of(
        used.begin(), used.end(), [&module = stage.module()](const UsedParts& each) { return each.parts == module; });
    for (const auto& item : stage.module()->named_parameters())
      if (item.value().defined() && item.value().has_storage() && item.value().numel() > 0)
        text += str(number, ' ', item.value().const_data_ptr(), ' ', digest_of_start(item.value()), ' ', is_used, ' ',
                    item.key(), '\n');
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
    while (lines >> place.stage >> place.address >> place.digest >> place.is_used &&
           std::getline(lines >> std::ws, place.name)) {
      place.address = process + ' ' + place.address;
      places.push_back(place);
    }
  }
  return places;
}

inline constexpr const char* ways_to_tie =
    "Stage::tie makes it one parameter of all these stages. Kinds dualpipe, dualpipev and zbv keep the first and the "
    "last stage on the same ranks; else let the first of the stages return the weight with its outputs, and those "
    "between hand it on";

/// One parameter of the model for all stages that use it.
///
/// @param held  by stage: ranks.
inline bool are_one(const ParameterPlace& a, const ParameterPlace& b, const std::vector<std::vector<int>>& held,
                    const Ties& ties) {
  const Tie* const tie = ties.find(a.stage, a.name);
  return (tie != nullptr && tie == ties.find(b.stage, b.name)) || held[a.stage] == held[b.stage];
}

inline void check_not_shared(const std::vector<ParameterPlace>& places, const Schedule& schedule, const Ties& ties) {
  const std::vector<std::vector<int>> held = holders(schedule);
  std::map<std::string, ParameterPlace> first_places, first_uses;  // by address; by name
  for (const ParameterPlace& place : places) {
    if (place.is_used) {
      const ParameterPlace& first = first_uses.try_emplace(place.name, place).first->second;
      DUALPIPE_CHECK(
          are_one(first, place, held, ties), "stages ", first.stage, " and ", place.stage, " both use parameter '",
          place.name,
          "' of their modules, but different ranks hold them, and each would train its own copy. If it is one "
          "parameter, say tie(\"",
          place.name, "\") of both; if not, give the parts of these modules other names");
    }
    const ParameterPlace& first = first_places.try_emplace(place.address, place).first->second;
    DUALPIPE_CHECK(are_one(first, place, held, ties), "stages ", first.stage, " and ", place.stage,
                   " share a parameter, '", first.name, "' of the one and '", place.name,
                   "' of the other, but different ranks hold them, and each would train its own copy. ", ways_to_tie);
    DUALPIPE_CHECK(place.rank == first.rank, "ranks ", first.rank, " and ", place.rank,
                   " are threads of one process, and parameter '", place.name, "' of stage ", place.stage,
                   " is the same tensor for both, which would train it at the same time; let the stage factory make a "
                   "module of its own each time it is called");
  }
}

/// In processes of their own, tied stages look like stages that were seeded alike. Both are worth a word.
inline void warn_of_equal(const std::vector<ParameterPlace>& places, const Schedule& schedule, const Ties& ties) {
  const std::vector<std::vector<int>> held = holders(schedule);
  std::map<std::pair<std::string, std::uint64_t>, int> first_stages;  // by name and digest
  for (const ParameterPlace& place : places) {
    if (place.digest == no_digest || ties.find(place.stage, place.name) != nullptr) continue;
    const int first = first_stages.try_emplace({place.name, place.digest}, place.stage).first->second;
    if (held[place.stage] == held[first]) continue;
    TORCH_WARN("stages ", first, " and ", place.stage, " begin with equal values of a parameter of the same name, '",
               place.name,
               "', and different ranks hold them. If they were seeded alike: leave that to DualPipeOptions::seed, or "
               "seed each stage by its number. If "
               "it is one weight that both use: each will train its own copy. ",
               ways_to_tie, ". This is said once");
    return;
  }
}

inline std::uint32_t version_of(const at::Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

/// The parameters of each stage, without those that a stage later in the order has too.
inline std::map<int, std::unordered_set<at::TensorImpl*>> summed_with(const std::map<int, Stage>& stages,
                                                                      const std::vector<int>& sum_order) {
  std::map<int, std::unordered_set<at::TensorImpl*>> result;
  std::unordered_set<at::TensorImpl*> later;
  for (auto stage = sum_order.rbegin(); stage != sum_order.rend(); ++stage) {
    const auto mine = stages.find(*stage);
    if (mine == stages.end() || !mine->second.module()) continue;
    for (const at::Tensor& parameter : mine->second.module()->parameters())
      if (parameter.defined() && later.insert(parameter.unsafeGetTensorImpl()).second)
        result[*stage].insert(parameter.unsafeGetTensorImpl());
  }
  return result;
}

using BufferReductions = std::unordered_map<const at::TensorImpl*, BufferReduction>;

/// Collective: of the buffers that `rules` name.
inline BufferReductions buffer_reductions(Communicator& world, const std::map<int, Stage>& stages,
                                          const std::map<std::string, BufferReduction>& rules) {
  BufferReductions reductions;
  if (rules.empty()) return reductions;
  std::unordered_set<std::string> used;
  agree_that_fine(world, finding_of([&] {
                    for (const auto& [number, stage] : stages) {
                      if (!stage.module()) continue;
                      for (const auto& item : stage.module()->named_buffers()) {
                        const std::string name = "." + item.key();
                        const std::pair<const std::string, BufferReduction>* best = nullptr;
                        for (const auto& rule : rules)
                          if (name.ends_with("." + rule.first) && (!best || rule.first.size() > best->first.size()))
                            best = &rule;
                        if (best == nullptr || !item.value().defined()) continue;
                        const at::ScalarType type = item.value().scalar_type();
                        DUALPIPE_CHECK(best->second == BufferReduction::mean
                                           ? item.value().is_floating_point()
                                           : best->second != BufferReduction::sum || type != at::kBool,
                                       "DualPipeOptions::buffers: ", best->first, " is to be a ", name_of(best->second),
                                       ", but buffer '", item.key(), "' of stage ", number, " is of type ", type);
                        used.insert(best->first);
                        reductions.emplace(item.value().unsafeGetTensorImpl(), best->second);
                      }
                    }
                  }));
  std::string mine;
  for (const std::string& name : used) mine += name + '\n';
  for (const std::string& text : all_gather_text(world, mine)) {
    std::istringstream lines(text);
    for (std::string name; std::getline(lines, name);) used.insert(name);
  }
  for (const auto& [name, reduction] : rules)
    DUALPIPE_CHECK(used.contains(name), "DualPipeOptions::buffers names '", name,
                   "', but no buffer of the model has that name or ends with it behind a dot");
  return reductions;
}

/// For each parameter the rank that owns it, of `num_ranks`. The largest come first, each to the rank that has least by
/// then. Those that are trained and those that are frozen are spread each for themselves.
inline std::vector<int> owners_of(const Tensors& parameters, int num_ranks) {
  std::vector<int> owners(parameters.size());
  for (const bool trained : {true, false}) {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < parameters.size(); ++i)
      if (parameters[i].requires_grad() == trained) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return parameters[a].nbytes() > parameters[b].nbytes(); });
    std::vector<std::size_t> bytes(num_ranks, 0);
    for (const std::size_t i : order) {
      const auto least = std::min_element(bytes.begin(), bytes.end());
      *least += parameters[i].nbytes();
      owners[i] = static_cast<int>(least - bytes.begin());
    }
  }
  return owners;
}

Replicas::Replicas(Communicator& world, const MeshShape& shape, const Schedule& schedule,
                   const std::map<int, Stage>& stages, const IsExpert& is_expert, const std::vector<int>& sum_order,
                   const DualPipeOptions& options)
    : world_(world), gradients_(options.gradient_dtype), shards_(options.shard_optimizer) {
  const auto places = parameter_places(all_gather_text(world, parameters_text(stages)));
  ties_ = Ties(world, shape, schedule, stages, is_expert);
  check_not_shared(places, schedule, ties_);
  if (world.rank() == 0) warn_of_equal(places, schedule, ties_);

  const BufferReductions reductions = buffer_reductions(world, stages, options.buffers);
  const bool tells_experts = is_expert && shape.expert > 1;
  std::vector<HolderSet> sets = holder_sets(schedule, shape, tells_experts);
  add_tied_sets(ties_, sets);
  std::vector<std::shared_ptr<Communicator>> groups = make_holder_groups(world, sets, shards_);
  std::unordered_set<at::TensorImpl*> seen_parameters, seen_buffers;
  for (const Tie& tie : ties_.all())
    if (tie.tensor.defined())
      (tie.is_parameter ? seen_parameters : seen_buffers).insert(tie.tensor.unsafeGetTensorImpl());
  for (std::size_t i = 0; i < sets.size(); ++i) {
    const HolderSet& set = sets[i];
    if (std::find(set.ranks.begin(), set.ranks.end(), world.rank()) == set.ranks.end()) continue;
    Group mine{.number = static_cast<int>(i), .communicator = std::move(groups[i])};
    const auto collect = [&](bool buffers) {
      for (const Tie* tie : set.ties) {
        if (tie->is_parameter == buffers) continue;
        (buffers ? mine.buffers : mine.parameters).push_back(tie->tensor);
        const auto& [stage, name] = tie->places.front();
        mine.names.push_back(str(buffers ? "buffer" : "parameter", " '", name, "' of stage ", stage, " (tied)"));
        for (const auto& place : tie->places)
          if (stages.contains(place.stage)) mine.tied_stage = place.stage;
      }
      for (const int number : set.stages) {
        const auto& module = stages.at(number).module();
        if (!module) continue;
        const auto wanted = [&](const std::string& name) {
          return !tells_experts || is_expert(str("stage", number, '.', name)) == set.experts;
        };
        if (buffers)
          append_new(module->named_buffers(), seen_buffers, mine.buffers, mine.names, "buffer", number, wanted);
        else
          append_new(module->named_parameters(), seen_parameters, mine.parameters, mine.names, "parameter", number,
                     wanted);
      }
    };
    collect(false);
    collect(true);
    for (const at::Tensor& buffer : mine.buffers) {
      const auto found = reductions.find(buffer.unsafeGetTensorImpl());
      mine.reductions.push_back(found == reductions.end() ? std::nullopt : std::optional(found->second));
    }
    const auto me = std::find(set.ranks.begin(), set.ranks.end(), world.rank()) - set.ranks.begin();
    const std::vector<int> owners = owners_of(mine.parameters, shards_ ? static_cast<int>(set.ranks.size()) : 1);
    for (std::size_t p = 0; p < mine.parameters.size(); ++p) {
      if (owners[p] == me) counted_.push_back(mine.parameters[p]);
      if (shards_) mine.owners[mine.parameters[p].unsafeGetTensorImpl()] = owners[p];
    }
    if (set.ranks.size() > 1) groups_.push_back(std::move(mine));
  }
  set_sum_order(stages, sum_order);
  if (shards_) {
    for (const at::Tensor& parameter : counted_) owned_.insert(parameter.unsafeGetTensorImpl());
    check_alike();
  }
  any_copies_ = std::any_of(sets.begin(), sets.end(), [](const HolderSet& set) { return set.ranks.size() > 1; });
  if (!any_copies_) return;
  const bool buffers =
      std::any_of(groups_.begin(), groups_.end(), [](const Group& group) { return !group.buffers.empty(); });
  for (const std::string& text : all_gather_text(world, buffers ? "buffers" : ""))
    watches_buffers_ = watches_buffers_ || !text.empty();
}

void Replicas::set_sum_order(const std::map<int, Stage>& stages, std::vector<int> sum_order) {
  if (sum_order == sum_order_) return;
  sum_order_ = std::move(sum_order);
  const auto summed = summed_with(stages, sum_order_);
  for (Group& group : groups_) {
    if (group.tied_stage >= 0) continue;
    group.of_stage.clear();
    for (const auto& [stage, of_stage] : summed)
      for (const at::Tensor& parameter : group.parameters)
        if (of_stage.contains(parameter.unsafeGetTensorImpl())) group.of_stage[stage].push_back(parameter);
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

void Replicas::check_alike() const {
  std::map<int, std::vector<std::uint64_t>> digests;
  for (const Group& group : groups_) {
    Digest digest;
    for (const at::Tensor& parameter : group.parameters) {
      digest.add(std::uint64_t{parameter.requires_grad()});
      digest.add(std::uint64_t{parameter.nbytes()});
    }
    digests[group.number] = {digest.value()};
  }
  for (const Difference& each : differences(digests))
    throw InvalidArgument(str("ranks ", world_.world_rank(each.rank), " and ", world_.world_rank(each.other),
                              " hold the same stages, but these have other parameters there, or others that require "
                              "grad, so the ranks would not agree on their owners (shard_optimizer); make and freeze a "
                              "stage alike on all ranks that hold it"));
}

void Replicas::begin_sum(int stage) {
  for (const Group& group : groups_) {
    const auto found = group.of_stage.find(stage);
    if (found != group.of_stage.end()) begin_sum(group, stage, found->second);
  }
}

void Replicas::begin_sum(const Group& group, int stage, const Tensors& parameters) {
  Sum sum{stage, {}, {}, {}, {}, {}};
  for (const at::Tensor& parameter : parameters)
    if (parameter.requires_grad()) sum.parameters.push_back(parameter);
  if (sum.parameters.empty()) return;
  sum.present = at::zeros({static_cast<std::int64_t>(sum.parameters.size())}, at::kInt);
  Tensors gradients;
  for (std::size_t i = 0; i < sum.parameters.size(); ++i) {
    at::Tensor& gradient = sum.parameters[i].mutable_grad();
    sum.present.mutable_data_ptr<int>()[i] = gradient.defined() ? 1 : 0;
    if (!gradient.defined())
      gradient = at::zeros_like(sum.parameters[i], gradient_type(sum.parameters[i], gradients_), {}, {}, {},
                                at::MemoryFormat::Contiguous);
    else if (gradient.is_sparse())
      gradient = gradient.to_dense();
    else
      gradient = gradient.contiguous();
    gradients.push_back(gradient);
  }
  Communicator& hosts = group.communicator->control();
  if (shards_) {
    sum.counts = hosts.all_reduce({sum.present});
    gradients.clear();
    send_to_owners(group, sum);
  } else {
    if (&hosts == group.communicator.get())
      gradients.push_back(sum.present);  // no message of its own
    else
      sum.counts = hosts.all_reduce({sum.present});
    sum.gradients = group.communicator->all_reduce(std::move(gradients));
  }
  sums_.push_back(std::move(sum));
}

void Replicas::send_to_owners(const Group& group, Sum& sum) {
  const at::NoGradGuard no_grad;
  const int me = group.communicator->rank(), num_ranks = group.communicator->size();
  std::map<at::ScalarType, std::vector<std::vector<std::size_t>>> by_dtype;  // and owner: of the parameters of the sum
  for (std::size_t i = 0; i < sum.parameters.size(); ++i) {
    auto& by_owner = by_dtype[sum.parameters[i].grad().scalar_type()];
    by_owner.resize(num_ranks);
    by_owner[group.owners.at(sum.parameters[i].unsafeGetTensorImpl())].push_back(i);
  }
  for (auto& [dtype, by_owner] : by_dtype) {
    const at::TensorOptions options = at::TensorOptions().dtype(dtype).device(group.communicator->device());
    Tensors outgoing;
    for (int owner = 0; owner < num_ranks; ++owner) {
      Tensors flat;
      for (const std::size_t i : by_owner[owner])
        if (owner != me) flat.push_back(std::exchange(sum.parameters[i].mutable_grad(), {}).flatten());
      outgoing.push_back(flat.empty() ? at::empty({0}, options) : at::cat(flat));
    }
    std::int64_t size = 0;
    for (const std::size_t i : by_owner[me]) size += sum.parameters[i].numel();
    Signature expected(num_ranks, {.dtype = dtype, .sizes = {size}});
    expected[me].sizes = {0};
    Pending parts = group.communicator->all_to_all(std::move(outgoing), expected);
    sum.shards.push_back({std::move(by_owner[me]), me, std::move(parts)});
  }
}

void Replicas::add_shard(const Sum& sum, Shard& shard) {
  const at::NoGradGuard no_grad;
  const Tensors parts = shard.parts.take();
  std::int64_t begin = 0;
  for (const std::size_t i : shard.owned) {
    const at::Tensor own = sum.parameters[i].grad().view({-1});
    at::Tensor total;
    for (int rank = 0; rank < std::ssize(parts); ++rank) {
      const at::Tensor part = rank == shard.rank ? own : parts[rank].narrow(0, begin, own.numel());
      // What was received is not written to: it may be the sender's memory.
      total = rank == 0 ? part : rank == 1 && shard.rank != 0 ? total + part : total.add_(part);
    }
    if (shard.rank != 0) own.copy_(total);
    begin += own.numel();
  }
}

bool Replicas::summed_before(const at::Tensor& parameter, int stage) const {
  const auto own = std::find(sum_order_.begin(), sum_order_.end(), stage);
  for (const Group& group : groups_)
    for (const auto& [number, parameters] : group.of_stage)
      if (std::any_of(parameters.begin(), parameters.end(), [&](const auto& each) { return each.is_same(parameter); }))
        return std::find(sum_order_.begin(), own, number) != own;
  return false;
}

void Replicas::finish_sums(Recorder& recorder) {
  for (const Group& group : groups_)
    if (group.tied_stage >= 0) begin_sum(group, group.tied_stage, group.parameters);
  for (Sum& sum : sums_) {
    if (sum.gradients) sum.gradients.wait();
    for (Shard& shard : sum.shards) add_shard(sum, shard);
    if (sum.counts) sum.counts.wait();
    for (std::size_t i = 0; i < sum.parameters.size(); ++i)
      if (sum.present.const_data_ptr<int>()[i] == 0) sum.parameters[i].mutable_grad().reset();
    const Step step{{Pass::BackwardWeight, sum.stage, 0}, {}};
    if (sum.gradients) recorder.record(Lane::reduction, step, sum.gradients, "gradients");
    for (const Shard& shard : sum.shards) recorder.record(Lane::reduction, step, shard.parts, "gradients");
  }
  sums_.clear();
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

void Replicas::broadcast_owned() {
  if (!shards_) return;
  at::NoGradGuard no_grad;
  std::vector<Pending> pending;
  for (const Group& group : groups_)
    for (int owner = 0; owner < group.communicator->size(); ++owner) {
      Tensors tensors;
      for (const at::Tensor& parameter : group.parameters)
        if (group.owners.at(parameter.unsafeGetTensorImpl()) == owner && parameter.requires_grad())
          tensors.push_back(parameter.detach());
      if (!tensors.empty()) pending.push_back(group.communicator->broadcast(std::move(tensors), owner));
    }
  for (Pending& each : pending) each.synchronize();
}

void Replicas::combine_buffers(const BufferTransaction& start) {
  if (watches_buffers_) warn_of_lost_buffers();
  at::NoGradGuard no_grad;
  struct Growth {
    at::Tensor buffer, sum;
    std::int64_t count;  // it grows by sum / count
  };
  std::vector<Growth> growths;
  std::vector<Pending> pending;
  for (const Group& group : groups_) {
    Tensors first, sums;
    for (std::size_t i = 0; i < group.buffers.size(); ++i) {
      const at::Tensor buffer = group.buffers[i].detach();
      const BufferReduction reduction = group.reductions[i].value_or(
          buffer.is_floating_point() ? BufferReduction::broadcast : BufferReduction::local);
      if (reduction == BufferReduction::broadcast) first.push_back(buffer);
      if (reduction != BufferReduction::sum && reduction != BufferReduction::mean) continue;
      const at::Tensor& before = start.before(group.buffers[i]);
      DUALPIPE_CHECK(buffer.sizes() == before.sizes(), group.names[group.parameters.size() + i],
                     " has got other sizes in the step, ", buffer.sizes(), " instead of ", before.sizes(),
                     ", so it does not add up");
      // What has not changed grows by 0, infinite or not.
      sums.push_back((buffer - before).masked_fill_(buffer.eq(before), 0).contiguous());
      growths.push_back({buffer, sums.back(), reduction == BufferReduction::mean ? group.communicator->size() : 1});
      buffer.copy_(before);
    }
    if (!first.empty()) pending.push_back(group.communicator->broadcast(std::move(first), 0));
    if (!sums.empty()) pending.push_back(group.communicator->all_reduce(std::move(sums)));
  }
  for (Pending& each : pending) each.wait();
  for (const auto& [buffer, sum, count] : growths) buffer.add_(count == 1 ? sum : sum / count);
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
  const Tensors all = world_.control().all_gather(at::tensor(mine, at::kLong)).take();
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
    if (each.rank != world_.rank()) continue;
    for (const Group& group : groups_)
      if (group.number == each.group)
        mine += str(mine.empty() ? "" : ", ", group.names[each.tensor], " on ranks ", world_.world_rank(each.rank),
                    " and ", world_.world_rank(each.other));
  }
  std::string text;
  for (const std::string& part : all_gather_text(world_, mine))
    if (!part.empty()) text += (text.empty() ? "" : ", ") + part;
  return text;
}

std::string Replicas::difference() const {
  if (!any_copies_) return {};
  std::map<int, std::vector<std::uint64_t>> digests;
  for (const Group& group : groups_) {
    std::vector<std::uint64_t>& values = digests[group.number];
    for (const at::Tensor& parameter : group.parameters) values.push_back(digest_of(parameter));
    for (std::size_t i = 0; i < group.buffers.size(); ++i)
      values.push_back(group.reductions[i] == BufferReduction::local ? 0 : digest_of(group.buffers[i]));
  }
  const std::vector<Difference> found = differences(digests);
  if (found.empty()) return {};
  return str(
      text_of({found.front()}),
      ", which hold the same stage, is not the same bit by bit: something changes it on each rank by itself, as "
      "max_norm of an embedding, noise, or a counter in a buffer does, or weights were loaded on some ranks only",
      shards_ ? ", or the optimizer is no ShardedOptimizer, which shard_optimizer needs. " : ". ",
      "broadcast_parameters() makes all copies equal; DualPipeOptions::buffers lets counters add up over the ranks; "
      "DualPipeOptions::compare_replicas_every says how often they are compared (0: never)");
}

void Replicas::warn_of_lost_buffers() {
  std::map<int, std::vector<std::uint64_t>> digests;
  std::size_t next = 0;
  for (const Group& group : groups_) {
    std::vector<std::uint64_t>& values = digests[group.number];
    values.assign(group.parameters.size(), 0);
    for (std::size_t i = 0; i < group.buffers.size(); ++i) {
      const bool unchanged = next < versions_.size() && versions_[next] == version_of(group.buffers[i]);
      values.push_back(unchanged || group.reductions[i] ? 0 : digest_of(group.buffers[i]));
      ++next;
    }
  }
  const std::vector<Difference> found = differences(digests);
  if (found.empty()) return;
  watches_buffers_ = false;
  const std::string text = text_of(found);
  if (world_.rank() == 0) {
    TORCH_WARN(
        "ranks that hold the same stage have changed its buffers in different ways, each by its own micro-batches: ",
        text,
        ". After each step floating-point buffers of the first rank replace the others, so running "
        "statistics, as those of BatchNorm, come from a part of the batch. DualPipeOptions::buffers says what is to "
        "be done instead, as {{\"running_mean\", BufferReduction::mean}}. "
        "Layers without them (GroupNorm, LayerNorm) do not have this problem, nor have kinds that keep each stage on "
        "one rank (dualpipev, zbv, 1f1b) without replicas. This is said once");
  }
}

}  // namespace dualpipe::detail
