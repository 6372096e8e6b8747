#include "train/checkpoint/model_state.hpp"

#include <c10/util/ArrayRef.h>

#include <cstddef>
#include <set>
#include <utility>

#include "dualpipe/error.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "train/safetensors/file.hpp"

namespace dualpipe::detail {
namespace {

StageState state_of(const torch::nn::Module& module) {
  StageState stage;
  for (const auto& item : module.named_parameters())
    if (item.value().defined()) stage.tensors[item.key()] = {item.value(), true};
  for (const auto& item : module.named_buffers())
    if (item.value().defined()) stage.tensors[item.key()] = {item.value(), false};
  return stage;
}

/// The state of a module that is trained as a whole: whichever name of a tensor a file has will do.
StageState state_of_whole(const torch::nn::Module& module) {
  StageState stage = state_of(module);
  std::map<const void*, std::vector<std::string>> names;
  for (const auto& [name, item] : stage.tensors) names[item.tensor.unsafeGetTensorImpl()].push_back(name);
  for (auto& [name, item] : stage.tensors)
    for (const std::string& other : names.at(item.tensor.unsafeGetTensorImpl()))
      if (other != name) item.also.push_back(other);
  return stage;
}

int number_of_stage(const std::string& name) { return std::stoi(name.substr(std::string("stage").size())); }

/// The state of a stage of a pipeline, by the number of the stage that has it: tied tensors are those of another. With
/// stage_prefix names are those of this cut and these expert groups: "stage2.weight", "stage2.part1.experts.0.weight".
std::map<int, StageState> state_of(const DualPipeImpl& pipe, const torch::nn::Module& module,
                                   const std::string& stage_name, bool stage_prefix) {
  std::map<int, StageState> stages;
  for (auto& [name, item] : state_of(module).tensors) {
    const std::string full_name = stage_name + "." + name;
    item.part = pipe.expert_part(full_name);
    std::vector<std::string> shown;
    const std::vector<std::string> all = pipe.tied_names(full_name);
    for (const std::string& each : all) {
      const auto dot = each.find('.');
      const std::string part = item.part < 0 ? "" : str("part", item.part, ".");
      shown.push_back((stage_prefix ? str(each.substr(0, dot), ".", part) : "") + each.substr(dot + 1));
    }
    for (std::size_t i = 1; i < shown.size(); ++i)
      if (shown[i] != shown[0]) item.also.push_back(shown[i]);
    const int number = number_of_stage(all[0]);
    stages[number].number = number;
    stages[number].tensors[shown[0]] = item;
  }
  return stages;
}

}  // namespace

ModelState model_state(const torch::nn::Module& model, bool stage_prefix) {
  ModelState state;
  const auto* pipe = dynamic_cast<const DualPipeImpl*>(&model);
  if (pipe == nullptr) {
    state.stages.push_back(state_of_whole(model));
  } else {
    // What is loaded goes through tensors, which share their values whether a module is const or not.
    state.pipe = const_cast<DualPipeImpl*>(pipe);  // NOLINT(cppcoreguidelines-pro-type-const-cast)
    state.communicator = pipe->world();
    for (const auto& child : pipe->named_children())
      for (auto& [number, stage] : state_of(*pipe, *child.value(), child.key(), stage_prefix))
        state.stages.push_back(std::move(stage));
  }
  // A tensor that several stages of this rank have under one name is listed once.
  std::set<std::pair<std::string, const void*>> seen;
  for (StageState& stage : state.stages)
    for (auto item = stage.tensors.begin(); item != stage.tensors.end();) {
      const void* tensor = item->second.tensor.unsafeGetTensorImpl();
      const bool first = seen.emplace(item->first, tensor).second;
      state.names.emplace(tensor, item->first);
      item = first ? std::next(item) : stage.tensors.erase(item);
    }
  return state;
}

TensorLine line_of(const std::string& name, const NamedState& item, int stage) {
  TensorLine line;
  line.name = name;
  line.dtype = safetensors_dtype(name, item.tensor);
  line.sizes = item.tensor.sizes().vec();
  line.stage = stage;
  line.part = item.part;
  line.is_parameter = item.is_parameter;
  line.also = item.also;
  return line;
}

WholeModel whole_model(const std::vector<std::vector<TensorLine>>& lines, const std::vector<int>& numbers) {
  WholeModel model;
  std::map<std::string, int> group_ranks;                    // the first whose optimizer has it
  std::map<std::string, std::string> stages, parts, groups;  // what is wrong, by name
  for (int rank = 0; rank < std::ssize(lines); ++rank)
    for (const TensorLine& line : lines[rank]) {
      const auto [found, added] = model.try_emplace(line.name);
      WholeTensor& tensor = found->second;
      if (added) {
        static_cast<TensorLine&>(tensor) = line;
        tensor.rank = rank;
      } else if (line.stage != tensor.stage) {
        stages.try_emplace(line.name, str(line.name, " (stages ", tensor.stage, " and ", line.stage, ")"));
      } else if (line.part != tensor.part) {
        parts.try_emplace(line.name, str(line.name, " (ranks ", numbers[tensor.rank], " and ", numbers[rank], ")"));
      }
      if (line.group >= 0) {
        const int first = group_ranks.try_emplace(line.name, rank).first->second;
        if (first == rank)
          tensor.group = line.group;
        else if (line.group != tensor.group)
          groups.try_emplace(line.name, str(line.name, " (", tensor.group, " on rank ", numbers[first], ", ",
                                            line.group, " on rank ", numbers[rank], ")"));
      }
      if (tensor.state_rank < 0 && !line.fields.empty()) {
        tensor.fields = line.fields;
        tensor.state_rank = rank;
      }
    }
  const auto texts = [](const auto& map) {
    std::vector<std::string> all;
    for (const auto& [name, text] : map) all.push_back(text);
    return listed(all);
  };
  DUALPIPE_CHECK(stages.empty(), "several stages use one name: ", texts(stages),
                 "; make stages by split(), which names layers, or say Stage::tie of what is one tensor, or set "
                 "CheckpointOptions::stage_prefix");
  DUALPIPE_CHECK(parts.empty(), "ranks have different experts under one name: ", texts(parts),
                 "; name experts by their numbers in the model, or set CheckpointOptions::stage_prefix");
  DUALPIPE_CHECK(groups.empty(), "the optimizers of ranks have one parameter in different groups: ", texts(groups));
  return model;
}

void to_json(nlohmann::json& json, const TensorLine& line) {
  json = {line.name,         line.dtype, line.sizes,  line.stage, line.part,
          line.is_parameter, line.group, line.fields, line.also};
}

void from_json(const nlohmann::json& json, TensorLine& line) {
  json.at(0).get_to(line.name);
  json.at(1).get_to(line.dtype);
  json.at(2).get_to(line.sizes);
  json.at(3).get_to(line.stage);
  json.at(4).get_to(line.part);
  json.at(5).get_to(line.is_parameter);
  json.at(6).get_to(line.group);
  json.at(7).get_to(line.fields);
  json.at(8).get_to(line.also);
}

std::string shape_text(const std::string& dtype, const std::vector<std::int64_t>& sizes) {
  return detail::str(dtype, " ", at::ArrayRef<std::int64_t>(sizes));
}

std::string listed(const std::vector<std::string>& names) {
  constexpr std::size_t most = 10;
  std::string text;
  for (std::size_t i = 0; i < names.size() && i < most; ++i) text += (i == 0 ? "" : ", ") + names[i];
  if (names.size() > most) text += str(" and ", names.size() - most, " more");
  return text;
}

}  // namespace dualpipe::detail
