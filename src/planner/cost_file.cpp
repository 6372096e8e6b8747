#include "dualpipe/planner/cost_file.hpp"

// Costs as JSON.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "planner/json.hpp"

namespace dualpipe::planner {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

using detail::brief;

/// An object whose members are taken one by one.
class Members {
 public:
  Members(const json& object, std::string where, std::initializer_list<const char*> known)
      : object_(object), where_(std::move(where)) {
    DUALPIPE_CHECK(object.is_object(), where_, " must be an object, got ", brief(object));
    for (const auto& [key, value] : object.items()) {
      bool is_known = false;
      std::string names;
      for (const char* name : known) {
        is_known = is_known || key == name;
        names += (names.empty() ? "" : ", ") + std::string(name);
      }
      DUALPIPE_CHECK(is_known, where_, ": unknown key ", brief(key), "; known are ", names);
    }
  }

  bool has(const char* key) const { return object_.contains(key); }
  std::string where(const char* key) const { return where_ + ": \"" + key + "\""; }

  /// Leaves `value` as it is where the key is absent.
  void number(const char* key, double& value) const {
    if (has(key)) value = number(object_[key], where(key));
  }
  /// The same for what takes time: zero is a mistake.
  void duration(const char* key, double& value) const {
    number(key, value);
    DUALPIPE_CHECK(!has(key) || value > 0, where(key), " must take time, got ", value);
  }
  void index(const char* key, int& value) const {
    if (has(key)) value = index(object_[key], where(key));
  }
  const json* list(const char* key) const {
    if (!has(key)) return nullptr;
    DUALPIPE_CHECK(object_[key].is_array(), where(key), " must be a list, got ", brief(object_[key]));
    return &object_[key];
  }
  const json& operator[](const char* key) const { return object_[key]; }

  static double number(const json& value, const std::string& where) {
    DUALPIPE_CHECK(value.is_number(), where, " must be a number, got ", brief(value));
    const auto number = value.get<double>();
    DUALPIPE_CHECK(std::isfinite(number) && number >= 0, where, " must be finite and not negative, got ", brief(value));
    return number;
  }
  static int index(const json& value, const std::string& where) {
    const double number = value.is_number_integer() ? value.get<double>() : -1;
    DUALPIPE_CHECK(number >= 0 && number <= std::numeric_limits<int>::max(), where,
                   " must be a whole number from 0 on, got ", brief(value));
    return static_cast<int>(number);
  }

 private:
  const json& object_;
  std::string where_;
};

std::string nth(const char* list, std::size_t index) { return detail::str("costs: \"", list, "\"[", index, "]"); }

void read_memory(const json& object, const std::string& where, StageMemory& memory) {
  const Members members(object, where, {"activation", "weight", "state"});
  members.number("activation", memory.activation);
  members.number("weight", memory.weight);
  members.number("state", memory.state);
}

void read_stages(const json& list, CostModel& model) {
  bool any_memory = false;
  bool any_size = false;
  std::vector<StageMemory> memories;
  std::vector<StageSize> sizes;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const Members members(list[i], nth("stages", i),
                          {"forward", "backward", "weight", "memory", "parameters", "bytes"});
    StageCosts stage{model.time.forward, model.time.backward, model.time.weight};
    members.duration("forward", stage.forward);
    members.duration("backward", stage.backward);
    members.number("weight", stage.weight);
    model.time.stages.push_back(stage);
    StageMemory memory{model.memory.activation, model.memory.weight, model.memory.state};
    if (members.has("memory")) read_memory(members["memory"], members.where("memory"), memory);
    any_memory = any_memory || members.has("memory");
    memories.push_back(memory);
    StageSize& size = sizes.emplace_back();
    members.number("parameters", size.parameters);
    members.number("bytes", size.bytes);
    any_size = any_size || members.has("parameters") || members.has("bytes");
  }
  if (any_memory) model.memory.stages = std::move(memories);
  if (any_size) model.sizes = std::move(sizes);
}

PairCost read_pair(const json& object, const std::string& where) {
  const Members members(object, where, {"forward", "backward", "duration"});
  for (const char* key : {"forward", "backward", "duration"})
    DUALPIPE_CHECK(members.has(key), where, " lacks \"", key, "\"");
  PairCost pair;
  members.index("forward", pair.forward);
  members.index("backward", pair.backward);
  members.duration("duration", pair.duration);
  return pair;
}

SendCost read_send(const json& object, const std::string& where) {
  const Members members(object, where, {"boundary", "ranks", "duration"});
  DUALPIPE_CHECK(members.has("duration"), where, " lacks \"duration\"");
  DUALPIPE_CHECK(members.has("boundary") || members.has("ranks"), where,
                 " names neither a \"boundary\" nor two \"ranks\"");
  SendCost send;
  members.index("boundary", send.boundary);
  if (const json* ranks = members.list("ranks")) {
    DUALPIPE_CHECK(ranks->size() == 2, members.where("ranks"), " must be two ranks, got ", brief(*ranks));
    send.rank_a = Members::index((*ranks)[0], members.where("ranks"));
    send.rank_b = Members::index((*ranks)[1], members.where("ranks"));
  }
  members.number("duration", send.duration);
  return send;
}

/// One key per line, and one object per line in lists, as a person would write it.
std::string text_of(const ordered_json& root) {
  std::string text;
  for (const auto& [key, value] : root.items()) {
    text += detail::str(text.empty() ? "{" : ",\n ", ordered_json(key).dump(), ": ");
    if (!value.is_array() || !value.front().is_object()) {
      text += value.dump();
      continue;
    }
    for (std::size_t i = 0; i < value.size(); ++i) text += detail::str(i == 0 ? "[\n  " : ",\n  ", value[i].dump());
    text += "]";
  }
  return text + "}\n";
}

}  // namespace

CostModel read_costs(std::string_view text) {
  const json root = detail::parse_json(text);
  const Members members(root, "costs",
                        {"forward", "backward", "weight", "pair", "send", "pair_ready", "memory", "stages", "pairs",
                         "sends", "slowdown", "seconds_per_unit"});
  CostModel model;
  Costs& time = model.time;
  members.duration("forward", time.forward);
  time.backward = 2 * time.forward;
  members.duration("backward", time.backward);
  time.weight = time.backward / 2;
  members.number("weight", time.weight);
  time.pair = time.forward + time.backward;
  members.duration("pair", time.pair);
  for (const double derived : {time.backward, time.pair})
    DUALPIPE_CHECK(std::isfinite(derived), "costs: \"forward\" and \"backward\" add up to ", derived,
                   ": choose a larger unit");
  members.number("send", time.send);
  members.number("seconds_per_unit", time.seconds_per_unit);
  if (members.has("pair_ready")) {
    const Members ready(members["pair_ready"], members.where("pair_ready"), {"activation", "gradient"});
    ready.number("activation", time.ready.activation);
    ready.number("gradient", time.ready.gradient);
  }
  if (members.has("memory")) {
    StageMemory memory;
    read_memory(members["memory"], members.where("memory"), memory);
    model.memory = {memory.activation, memory.weight, memory.state, {}};
  }
  if (const json* stages = members.list("stages")) read_stages(*stages, model);
  if (const json* pairs = members.list("pairs"))
    for (std::size_t i = 0; i < pairs->size(); ++i) time.pairs.push_back(read_pair((*pairs)[i], nth("pairs", i)));
  if (const json* sends = members.list("sends"))
    for (std::size_t i = 0; i < sends->size(); ++i) time.sends.push_back(read_send((*sends)[i], nth("sends", i)));
  if (const json* slowdown = members.list("slowdown"))
    for (std::size_t i = 0; i < slowdown->size(); ++i)
      time.slowdown.push_back(Members::number((*slowdown)[i], nth("slowdown", i)));
  return model;
}

std::string to_json(const CostModel& model) {
  const Costs& time = model.time;
  const auto memory_of = [](double activation, double weight, double state) {
    return ordered_json{{"activation", activation}, {"weight", weight}, {"state", state}};
  };
  ordered_json root{{"forward", time.forward}, {"backward", time.backward},
                    {"weight", time.weight},   {"pair", time.pair},
                    {"send", time.send},       {"seconds_per_unit", time.seconds_per_unit}};
  if (time.ready.activation > 0) root["pair_ready"]["activation"] = time.ready.activation;
  if (time.ready.gradient > 0) root["pair_ready"]["gradient"] = time.ready.gradient;
  root["memory"] = memory_of(model.memory.activation, model.memory.weight, model.memory.state);
  for (std::size_t i = 0; i < std::max({time.stages.size(), model.memory.stages.size(), model.sizes.size()}); ++i) {
    ordered_json& stage = root["stages"].emplace_back(ordered_json::object());
    if (i < time.stages.size())
      stage = {{"forward", time.stages[i].forward},
               {"backward", time.stages[i].backward},
               {"weight", time.stages[i].weight}};
    if (i < model.sizes.size()) {
      stage["parameters"] = model.sizes[i].parameters;
      stage["bytes"] = model.sizes[i].bytes;
    }
    if (i >= model.memory.stages.size()) continue;
    const StageMemory& memory = model.memory.stages[i];
    stage["memory"] = memory_of(memory.activation, memory.weight, memory.state);
  }
  for (const PairCost& pair : time.pairs)
    root["pairs"].push_back({{"forward", pair.forward}, {"backward", pair.backward}, {"duration", pair.duration}});
  for (const SendCost& send : time.sends) {
    ordered_json& entry = root["sends"].emplace_back(ordered_json::object());
    if (send.boundary != SendCost::any) entry["boundary"] = send.boundary;
    if (send.rank_a != SendCost::any) entry["ranks"] = {send.rank_a, send.rank_b};
    entry["duration"] = send.duration;
  }
  if (!time.slowdown.empty()) root["slowdown"] = time.slowdown;
  return text_of(root);
}

}  // namespace dualpipe::planner
