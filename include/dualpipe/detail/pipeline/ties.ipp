#pragma once

#include "dualpipe/detail/pipeline/ties.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>
#include <sstream>
#include <tuple>

#include "dualpipe/detail/comm/agree.hpp"

namespace dualpipe::detail {

/// One of a tie's places, as a rank tells it to the others.
struct TiedTensor {
  std::string tie;  ///< what Stage::tie() calls it
  Tie::Place place;
  std::string type;  ///< "parameter Double [4, 6]"
  at::Tensor tensor = {};
};

/// What this rank's stages tie, by the name of the tie and by place. @throws InvalidArgument  no such part; one rank has
/// several tensors of one tie, or one tensor in several.
inline std::vector<TiedTensor> tied_here(const std::map<int, Stage>& stages, int rank) {
  std::vector<TiedTensor> tied;
  std::map<std::string, const TiedTensor*> first;
  std::map<at::TensorImpl*, std::string> names;
  for (const auto& [number, stage] : stages) {
    for (const auto& [part, name] : stage.ties()) {
      const std::size_t before = tied.size();
      const auto add = [&, number = number, &part = part, &name = name](const auto& items, const char* kind) {
        for (const auto& item : items) {
          const bool within = item.key() == part || item.key().starts_with(part + ".");
          if (!within || !item.value().defined()) continue;
          const at::Tensor& tensor = item.value();
          tied.push_back({name + item.key().substr(part.size()),
                          {number, item.key()},
                          detail::str(kind, " ", tensor.scalar_type(), " ", tensor.sizes()),
                          tensor});
        }
      };
      if (stage.module()) {
        add(stage.module()->named_parameters(), "parameter");
        add(stage.module()->named_buffers(), "buffer");
      }
      DUALPIPE_CHECK(tied.size() > before, "stage ", number, " ties '", part,
                     "', but its module has no parameter, buffer or module of that name with any of these");
    }
  }
  std::sort(tied.begin(), tied.end(),
            [](const auto& a, const auto& b) { return std::tie(a.tie, a.place) < std::tie(b.tie, b.place); });
  std::set<Tie::Place> places;
  for (const TiedTensor& each : tied) {
    DUALPIPE_CHECK(places.insert(each.place).second, "stage ", each.place.stage, " ties '", each.place.name,
                   "' twice, by itself and as a part of a module");
    const TiedTensor& other = *first.try_emplace(each.tie, &each).first->second;
    DUALPIPE_CHECK(
        other.tensor.is_same(each.tensor), "rank ", rank, " has '", other.place.name, "' of stage ", other.place.stage,
        " and '", each.place.name, "' of stage ", each.place.stage, ", both tied as '", each.tie,
        "', but they are two tensors. Stages of one rank share one: capture its module in the stage factory, "
        "once for each rank, and let each of these stages register it");
    const std::string& name = names.try_emplace(each.tensor.unsafeGetTensorImpl(), each.tie).first->second;
    DUALPIPE_CHECK(name == each.tie, "'", each.place.name, "' of stage ", each.place.stage, " is tied as '", name,
                   "' and as '", each.tie, "', but it is one tensor");
  }
  return tied;
}

inline std::string tied_text(const std::vector<TiedTensor>& tied) {
  std::string text;
  for (const TiedTensor& each : tied)
    text += str(each.place.stage, '\n', each.place.name, '\n', each.tie, '\n', each.type, '\n');
  return text;
}

inline std::vector<TiedTensor> tied_of(const std::string& text) {
  std::vector<TiedTensor> tied;
  std::istringstream lines(text);
  std::string stage;
  while (std::getline(lines, stage)) {
    TiedTensor& next = tied.emplace_back();
    next.place.stage = std::stoi(stage);
    std::getline(lines, next.place.name);
    std::getline(lines, next.tie);
    std::getline(lines, next.type);
  }
  return tied;
}

Ties::Ties(Communicator& world, const MeshShape& shape, const Schedule& schedule, const std::map<int, Stage>& stages,
           const IsExpert& is_expert) {
  std::vector<TiedTensor> mine;
  agree_that_fine(world, finding_of([&] { mine = tied_here(stages, world.world_rank(world.rank())); }));
  std::map<std::string, std::map<Tie::Place, std::string>> by_name;  // the types
  std::map<Tie::Place, std::map<int, std::string>> said;             // the ties, by rank
  int rank = 0;
  for (const std::string& text : all_gather_text(world, tied_text(mine))) {
    for (const TiedTensor& each : tied_of(text)) {
      by_name[each.tie].try_emplace(each.place, each.type);
      said[each.place][rank] = each.tie + " as a " + each.type;
    }
    ++rank;
  }
  const std::vector<std::vector<int>> held = holders(schedule);
  for (const auto& [name, types] : by_name) {
    const auto& [first, type] = *types.begin();
    DUALPIPE_CHECK(types.size() > 1 || schedule.num_stages == 1, "'", first.name, "' of stage ", first.stage,
                   " is tied as '", name,
                   "', but no other stage ties anything as that; Stage::tie takes the same name in all of them");
    Tie tie{.places = {}, .ranks = {}, .is_parameter = type.starts_with("parameter"), .tensor = {}};
    std::set<int> ranks;
    for (const auto& [place, other] : types) {
      DUALPIPE_CHECK(other == type, "what is tied as '", name, "' is of one type and size: '", first.name,
                     "' of stage ", first.stage, " is a ", type, ", but '", place.name, "' of stage ", place.stage,
                     " is a ", other);
      DUALPIPE_CHECK(!is_expert || shape.expert == 1 || !is_expert(str("stage", place.stage, '.', place.name)), "'",
                     place.name, "' of stage ", place.stage,
                     " is a part of experts, of which ranks have different ones, so it cannot be tied");
      tie.places.push_back(place);
      for (const int holder : held[place.stage])
        for (int replica = 0; replica < shape.data; ++replica) {
          const int holding = shape.rank_of(holder, replica);
          ranks.insert(holding);
          DUALPIPE_CHECK(said[place][holding] == said[place].begin()->second, "ranks ",
                         world.world_rank(said[place].begin()->first), " and ", world.world_rank(holding),
                         " hold stage ", place.stage, ", but do not tie its '", place.name,
                         "' in the same way; make a stage alike on all ranks that hold it");
        }
      by_place_[place] = ties_.size();
    }
    tie.ranks.assign(ranks.begin(), ranks.end());
    const auto own = std::find_if(mine.begin(), mine.end(), [&, &tied = name](const auto& m) { return m.tie == tied; });
    if (own != mine.end()) tie.tensor = own->tensor;
    ties_.push_back(std::move(tie));
  }
}

}  // namespace dualpipe::detail
