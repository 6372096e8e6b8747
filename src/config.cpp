#include "dualpipe/config.hpp"

#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "planner/json.hpp"

namespace dualpipe {
namespace {

using Json = nlohmann::json;

/// Assigns one member from its JSON value; false: the value has another type or range.
using Setter = std::function<bool(DualPipeOptions&, const Json&)>;

// Each assigns its last argument from a JSON value, and is false where the value has another type or range.

bool take(const Json& value, int& count) {
  if (!value.is_number_integer()) return false;
  const auto number = value.is_number_unsigned() && value.get<std::uint64_t>() > std::numeric_limits<int>::max()
                          ? std::int64_t{-1}
                          : value.get<std::int64_t>();
  if (number < 0 || number > std::numeric_limits<int>::max()) return false;
  count = static_cast<int>(number);
  return true;
}

bool take(const Json& value, std::optional<std::uint64_t>& number) {
  if (!value.is_number_unsigned()) return false;
  number = value.get<std::uint64_t>();
  return true;
}

bool take(const Json& value, bool& flag) {
  if (!value.is_boolean()) return false;
  flag = value.get<bool>();
  return true;
}

bool take(const Json& value, std::string& text) {
  if (!value.is_string()) return false;
  text = value.get<std::string>();
  return true;
}

template <class Enum>
bool take(const Json& value, const std::map<std::string, Enum>& names, Enum& choice) {
  const auto found = value.is_string() ? names.find(value.get<std::string>()) : names.end();
  if (found == names.end()) return false;
  choice = found->second;
  return true;
}

template <class T>
Setter plain(T DualPipeOptions::* member) {
  return [member](DualPipeOptions& options, const Json& value) { return take(value, options.*member); };
}

template <class Enum>
Setter choice(Enum DualPipeOptions::* member, std::map<std::string, Enum> names) {
  return [member, names = std::move(names)](DualPipeOptions& options, const Json& value) {
    return take(value, names, options.*member);
  };
}

/// [{"how": "concat", "dim": 1}, …], each member optional; of Merge or Split.
template <class Way>
bool take_ways(const Json& value, const std::map<std::string, decltype(Way::how)>& names, std::vector<Way>& ways) {
  if (!value.is_array()) return false;
  for (const Json& entry : value) {
    if (!entry.is_object()) return false;
    Way& way = ways.emplace_back();
    for (const auto& [name, member] : entry.items())
      if (!(name == "how" && take(member, names, way.how)) && !(name == "dim" && take(member, way.dim))) return false;
  }
  return true;
}

bool set_merges(DualPipeOptions& options, const Json& value) {
  return take_ways<Merge>(value,
                          {{"concat", Merge::How::concat}, {"stack", Merge::How::stack}, {"list", Merge::How::list}},
                          options.merge_outputs);
}

bool set_splits(DualPipeOptions& options, const Json& value) {
  const std::map<std::string, std::vector<Split> BatchSplit::*> members{
      {"inputs", &BatchSplit::inputs}, {"targets", &BatchSplit::targets}, {"extras", &BatchSplit::extras}};
  if (!value.is_object()) return false;
  for (const auto& [name, splits] : value.items()) {
    const auto member = members.find(name);
    if (member == members.end() ||
        !take_ways<Split>(splits,
                          {{"chunk", Split::How::chunk}, {"whole", Split::How::whole}, {"list", Split::How::list}},
                          options.split.*member->second))
      return false;
  }
  return true;
}

/// {"running_mean": "mean", …}
bool set_buffers(DualPipeOptions& options, const Json& value) {
  const std::map<std::string, BufferReduction> names{{"broadcast", BufferReduction::broadcast},
                                                     {"sum", BufferReduction::sum},
                                                     {"mean", BufferReduction::mean},
                                                     {"local", BufferReduction::local}};
  if (!value.is_object()) return false;
  for (const auto& [name, reduction] : value.items())
    if (!take(reduction, names, options.buffers[name])) return false;
  return true;
}

struct Key {
  const char* allowed;
  Setter set;
};

std::map<std::string, Key> keys() {
  return {
      {"num_micro_batches", {"an integer >= 0", plain(&DualPipeOptions::num_micro_batches)}},
      {"num_ranks", {"an integer >= 0", plain(&DualPipeOptions::num_ranks)}},
      {"chunks_per_rank", {"an integer >= 0", plain(&DualPipeOptions::chunks_per_rank)}},
      {"batch_dim", {"an integer >= 0", plain(&DualPipeOptions::batch_dim)}},
      {"merge_outputs",
       {"a list of objects with \"how\", which is \"concat\", \"stack\" or \"list\", and \"dim\", an integer >= 0",
        set_merges}},
      {"split",
       {"an object with \"inputs\", \"targets\" and \"extras\", lists of objects with \"how\", which is \"chunk\", "
        "\"whole\" or \"list\", and \"dim\", an integer >= 0",
        set_splits}},
      {"buffers", {"an object from names to \"broadcast\", \"sum\", \"mean\" or \"local\"", set_buffers}},
      {"compare_replicas_every", {"an integer >= 0", plain(&DualPipeOptions::compare_replicas_every)}},
      {"seed", {"an integer >= 0", plain(&DualPipeOptions::seed)}},
      {"keep_outputs", {"true or false", plain(&DualPipeOptions::keep_outputs)}},
      {"asynchronous", {"true or false", plain(&DualPipeOptions::asynchronous)}},
      {"shard_optimizer", {"true or false", plain(&DualPipeOptions::shard_optimizer)}},
      {"publish",
       {"\"early\" or \"atomic\"",
        choice(&DualPipeOptions::publish, {{"early", Publish::early}, {"atomic", Publish::atomic}})}},
      {"loss_reduction",
       {"\"mean\" or \"sum\"",
        choice(&DualPipeOptions::loss_reduction, {{"mean", LossReduction::mean}, {"sum", LossReduction::sum}})}},
      {"gradient_dtype",
       {"\"parameter\" or \"float32\"",
        choice(&DualPipeOptions::gradient_dtype,
               {{"parameter", GradientDtype::parameter}, {"float32", GradientDtype::float32}})}},
      {"on_non_finite",
       {"\"error\", \"skip\" or \"keep\"",
        choice(&DualPipeOptions::on_non_finite,
               {{"error", OnNonFinite::error}, {"skip", OnNonFinite::skip}, {"keep", OnNonFinite::keep}})}},
      {"record_to", {"a string: the path of a folder", plain(&DualPipeOptions::record_to)}},
      {"schedule", {"a string: a kind or the path of a CSV file", plain(&DualPipeOptions::schedule)}},
  };
}

}  // namespace

DualPipeOptions DualPipeOptions::from_json(const std::string& text, const std::string& origin) {
  Json json;
  try {
    json = detail::parse_json(text);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(origin + ": " + error.what());
  }
  DUALPIPE_CHECK(json.is_object(), origin, " must hold a JSON object, found ", json.type_name());
  const std::map<std::string, Key> known = keys();
  DualPipeOptions options;
  for (const auto& [name, value] : json.items()) {
    const auto key = known.find(name);
    if (key == known.end()) {
      std::string names;
      for (const auto& entry : known) names += (names.empty() ? "" : ", ") + entry.first;
      throw InvalidArgument(detail::str(origin, ": unknown key ", detail::brief(name), "; known are ", names));
    }
    DUALPIPE_CHECK(key->second.set(options, value), origin, ": \"", name, "\" must be ", key->second.allowed, ", got ",
                   detail::brief(value));
  }
  return options;
}

DualPipeOptions DualPipeOptions::from_json_file(const std::string& path) {
  return from_json(detail::read_file(path), path);
}

}  // namespace dualpipe
