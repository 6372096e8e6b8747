#include "train/checkpoint/model_state.hpp"

#include <c10/util/ArrayRef.h>

#include <cstddef>
#include <set>
#include <utility>

#include "dualpipe/error.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "train/safetensors/file.hpp"

namespace dualpipe::detail {
namespace {

StageState state_of(const torch::nn::Module& module, const std::string& prefix) {
  StageState stage;
  for (const auto& item : module.named_parameters())
    if (item.value().defined()) stage.tensors[prefix + item.key()] = {item.value(), true};
  for (const auto& item : module.named_buffers())
    if (item.value().defined()) stage.tensors[prefix + item.key()] = {item.value(), false};
  return stage;
}

}  // namespace

ModelState model_state(const torch::nn::Module& model, bool stage_prefix) {
  ModelState state;
  const auto* pipe = dynamic_cast<const DualPipeImpl*>(&model);
  if (pipe == nullptr) {
    state.stages.push_back(state_of(model, ""));
  } else {
    // What is loaded goes through tensors, which share their values whether a module is const or not.
    state.pipe = const_cast<DualPipeImpl*>(pipe);  // NOLINT(cppcoreguidelines-pro-type-const-cast)
    state.communicator = pipe->communicator();
    for (const auto& child : pipe->named_children()) {
      const int number = std::stoi(child.key().substr(std::string("stage").size()));
      StageState stage = state_of(*child.value(), stage_prefix ? child.key() + "." : "");
      stage.number = number;
      stage.is_owned = holders(pipe->schedule(), number).front() == state.communicator->rank();
      state.stages.push_back(std::move(stage));
    }
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
  line.is_parameter = item.is_parameter;
  return line;
}

void to_json(nlohmann::json& json, const TensorLine& line) {
  json = {line.name, line.dtype, line.sizes, line.stage, line.is_parameter, line.group, line.fields};
}

void from_json(const nlohmann::json& json, TensorLine& line) {
  json.at(0).get_to(line.name);
  json.at(1).get_to(line.dtype);
  json.at(2).get_to(line.sizes);
  json.at(3).get_to(line.stage);
  json.at(4).get_to(line.is_parameter);
  json.at(5).get_to(line.group);
  json.at(6).get_to(line.fields);
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
