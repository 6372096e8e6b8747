#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/train/checkpoint.hpp"
#include "dualpipe/train/safetensors.hpp"
#include "train/checkpoint/group.hpp"
#include "train/checkpoint/manifest.hpp"
#include "train/checkpoint/model_state.hpp"
#include "train/checkpoint/optimizer_state.hpp"
#include "train/checkpoint/values.hpp"
#include "train/safetensors/file.hpp"

namespace dualpipe {
namespace detail {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

/// The tensors of several safetensors files.
class TensorFiles {
 public:
  TensorFiles() = default;
  /// @param index  from a tensor's name to its file.
  TensorFiles(const fs::path& folder, const std::map<std::string, std::string>& index) {
    std::map<std::string, std::size_t> numbers;
    for (const auto& [name, file] : index) {
      const auto [number, added] = numbers.emplace(file, files_.size());
      if (added) add(folder / file);
      DUALPIPE_CHECK(files_[number->second].tensors().contains(name), (folder / file).string(), " has no tensor ", name,
                     ", which the index says it has");
      where_[name] = number->second;
    }
  }
  explicit TensorFiles(const fs::path& file) {
    add(file);
    for (const auto& [name, entry] : files_[0].tensors()) where_[name] = 0;
  }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& [name, number] : where_) names.push_back(name);
    return names;
  }
  bool contains(const std::string& name) const { return where_.contains(name); }
  const SafetensorsFile::Entry& entry(const std::string& name) const { return file(name).tensors().at(name); }
  at::Tensor read(const std::string& name) const { return file(name).read(name); }

 private:
  void add(const fs::path& path) { files_.emplace_back(path.string()); }
  const SafetensorsFile& file(const std::string& name) const { return files_[where_.at(name)]; }

  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::size_t> where_;
};

/// Every stage that this rank holds, with the groups of an optimizer, if there is one.
std::vector<TensorLine> lines_of(const ModelState& model, const torch::optim::Optimizer* optimizer) {
  std::map<const void*, int> groups;
  if (optimizer != nullptr) groups = group_indices(*optimizer, model);
  std::vector<TensorLine> lines;
  for (const StageState& stage : model.stages)
    for (const auto& [name, item] : stage.tensors) {
      TensorLine line = line_of(name, item, stage.number);
      if (const auto group = groups.find(item.tensor.unsafeGetTensorImpl()); group != groups.end())
        line.group = group->second;
      lines.push_back(std::move(line));
    }
  return lines;
}

/// Collective: the tensors of the whole model, by name, the same on all ranks.
WholeModel gather_model(const CheckpointGroup& group, const ModelState& model,
                        const torch::optim::Optimizer* optimizer) {
  std::string text;
  const std::string finding = finding_of([&] { text = Json(lines_of(model, optimizer)).dump(); });
  throw_findings(group.gather(finding), group.numbers());
  std::vector<std::vector<TensorLine>> lines;
  for (const std::string& each : group.gather(text)) lines.push_back(Json::parse(each).get<std::vector<TensorLine>>());
  return whole_model(lines, group.numbers());
}

bool is_floating(const std::string& dtype) { return dtype.starts_with('F') || dtype == "BF16"; }

std::string dtype_text(const SafetensorsFile::Entry& entry) {
  return safetensors_dtype("", at::empty({0}, at::TensorOptions().dtype(entry.dtype)));
}

/// What the tensors of a model are called in files.
struct FileNames {
  std::map<std::string, std::string> names;  ///< by the model's names
  std::set<std::string> known;               ///< these, and other names of the same tensors
};

/// Of the names of a tensor the files may have any.
///
/// @param file_name  from a name of the model to that in the files; gives an empty one for what is not to be loaded.
template <class FileName>
FileNames file_names_of(const WholeModel& model, const TensorFiles& files, const FileName& file_name) {
  FileNames found;
  for (const auto& [name, line] : model) {
    std::string chosen = file_name(name);
    if (chosen.empty()) continue;
    found.known.insert(chosen);
    for (const std::string& other : line.also) {
      const std::string also = file_name(other);
      found.known.insert(also);
      if (!files.contains(chosen) && files.contains(also)) chosen = also;
    }
    found.names[name] = chosen;
  }
  return found;
}

/// What the files lack, have too much or have otherwise; empty: nothing.
std::string difference(const WholeModel& model, const TensorFiles& files, const FileNames& file_names, bool converts,
                       bool allow_unused) {
  std::vector<std::string> missing, other, unused;
  for (const auto& [name, file_name] : file_names.names) {
    const std::string shown = name == file_name ? name : name + " (" + file_name + " in the file)";
    if (!files.contains(file_name)) {
      missing.push_back(shown);
      continue;
    }
    const TensorLine& line = model.at(name);
    const SafetensorsFile::Entry& entry = files.entry(file_name);
    const std::string dtype = dtype_text(entry);
    const bool same = dtype == line.dtype || (converts && is_floating(dtype) && is_floating(line.dtype));
    if (!same || entry.sizes != line.sizes)
      other.push_back(str(shown, " (", shape_text(dtype, entry.sizes), " in the file, ",
                          shape_text(line.dtype, line.sizes), " in the model)"));
  }
  if (!allow_unused)
    for (const std::string& name : files.names())
      if (!file_names.known.contains(name)) unused.push_back(name);
  std::string text;
  if (!missing.empty()) text += "; missing are " + listed(missing);
  if (!unused.empty()) text += "; the model does not have " + listed(unused);
  if (!other.empty()) text += "; other sizes or dtypes have " + listed(other);
  return text;
}

/// Values that go into tensors of the model.
using Staged = std::vector<std::pair<at::Tensor, at::Tensor>>;

Staged staged_weights(const ModelState& model, const TensorFiles& files,
                      const std::map<std::string, std::string>& file_names) {
  Staged staged;
  for (const StageState& stage : model.stages)
    for (const auto& [name, item] : stage.tensors)
      if (const auto file_name = file_names.find(name); file_name != file_names.end())
        staged.emplace_back(item.tensor, files.read(file_name->second));
  return staged;
}

void apply_weights(const Staged& staged, const ModelState& model) {
  {
    at::NoGradGuard no_grad;
    for (const auto& [tensor, value] : staged) at::Tensor(tensor).copy_(value);
  }
  if (model.pipe != nullptr) model.pipe->broadcast_parameters();
}

/// A checkpoint that is complete here, as its manifest says.
struct Opened {
  fs::path folder;
  Manifest manifest;
};

/// Collective: rank 0 chooses, and all read the same.
Opened open_checkpoint(const CheckpointGroup& group, const fs::path& folder) {
  std::string chosen;  // within folder
  group.on_rank(0, [&] {
    std::error_code error;
    DUALPIPE_CHECK(fs::is_directory(folder, error), "cannot load ", folder.string(), ": it is no folder");
    if (fs::exists(folder / manifest_name, error)) return;
    const auto complete = complete_checkpoints(folder);
    DUALPIPE_CHECK(!complete.empty(), "there is no complete checkpoint in ", folder.string());
    chosen = complete.rbegin()->second.filename().string();
  });
  chosen = group.gather(chosen)[0];
  Opened opened{chosen.empty() ? folder : folder / chosen, {}};
  std::string text;
  group.on_all([&] {
    const std::string path = (opened.folder / manifest_name).string();
    text = read_file(path);
    opened.manifest = Manifest::parse(text, path);
  });
  const std::vector<std::string> sums = group.gather(Checksum::of(text));
  for (std::size_t rank = 1; rank < sums.size(); ++rank)
    DUALPIPE_CHECK(sums[rank] == sums[0], "ranks ", group.numbers()[0], " and ", group.numbers()[rank],
                   " see different checkpoints; all ranks need one shared folder");
  // Every file once, by one of the ranks.
  group.on_all([&] {
    int number = 0;
    for (const auto& [file, record] : opened.manifest.files) {
      if (number++ % group.size() != group.rank()) continue;
      const fs::path path = opened.folder / file;
      const FileRecord found = record_of(path);
      DUALPIPE_CHECK(found.bytes == record.bytes, path.string(), " has ", found.bytes, " bytes, the manifest says ",
                     record.bytes);
      DUALPIPE_CHECK(found == record, path.string(), " was altered: its xxh64 is ", found.xxh64, ", the manifest says ",
                     record.xxh64);
    }
  });
  return opened;
}

/// The states of this rank's optimizer, read but not applied.
struct StagedOptimizer {
  std::map<void*, std::unique_ptr<torch::optim::OptimizerParamState>> states;
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> options;
};

/// From other names of a tensor to that which it has in the model.
std::map<std::string, std::string> names_in_model(const WholeModel& model) {
  std::map<std::string, std::string> names;
  for (const auto& [name, line] : model)
    for (const std::string& other : line.also) names[other] = name;
  for (const auto& [name, line] : model) names[name] = name;
  return names;
}

/// The same on all ranks. @throws InvalidArgument  states of another optimizer.
void check_optimizer(const WholeModel& model, const TensorFiles& files, const Json& saved, const OptimizerKind& kind,
                     std::size_t num_groups) {
  DUALPIPE_CHECK(saved.at("kind") == kind.name(), "the checkpoint is of the optimizer ",
                 saved.at("kind").get<std::string>(), ", here it is ", kind.name());
  DUALPIPE_CHECK(saved.at("groups").size() == num_groups, "the checkpoint is of an optimizer with ",
                 saved.at("groups").size(), " parameter groups, here it has ", num_groups);
  std::vector<std::string> moved, unknown, other;
  const std::map<std::string, std::string> names = names_in_model(model);
  const auto find = [&](const std::string& name) {
    const auto found = names.find(name);
    return found == names.end() ? model.end() : model.find(found->second);
  };
  for (const auto& [name, group] : saved.at("group_of").items())
    if (const auto line = find(name); line != model.end() && line->second.group != group.get<int>())
      moved.push_back(name);
  for (const std::string& key : files.names()) {
    const auto line = find(key.substr(0, key.rfind('.')));
    if (line == model.end() || line->second.group < 0)
      unknown.push_back(key);
    else if (const auto& entry = files.entry(key); !entry.sizes.empty() && entry.sizes != line->second.sizes)
      other.push_back(str(key, " (", shape_text(dtype_text(entry), entry.sizes), ", the parameter is ",
                          shape_text(line->second.dtype, line->second.sizes), ")"));
  }
  DUALPIPE_CHECK(unknown.empty(),
                 "the checkpoint has states of what the optimizer does not train here: ", listed(unknown));
  DUALPIPE_CHECK(moved.empty(), "the checkpoint has other parameter groups of ", listed(moved));
  DUALPIPE_CHECK(other.empty(), "optimizer states have other sizes than their parameters: ", listed(other));
}

StagedOptimizer staged_optimizer(const ModelState& model, const WholeModel& whole, const TensorFiles& files,
                                 const Json& saved, const OptimizerKind& kind,
                                 const torch::optim::Optimizer& optimizer) {
  StagedOptimizer staged;
  std::map<std::string, std::map<std::string, std::string>> fields;  // by parameter: the keys, by field
  const std::map<std::string, std::string> names = names_in_model(whole);
  for (const std::string& key : files.names()) {
    const std::size_t dot = key.rfind('.');
    fields[names.at(key.substr(0, dot))].try_emplace(key.substr(dot + 1), key);
  }
  const std::map<const void*, int> own = group_indices(optimizer, model);
  for (const StageState& stage : model.stages)
    for (const auto& [name, item] : stage.tensors) {
      const auto found = fields.find(name);
      void* key = item.tensor.unsafeGetTensorImpl();
      if (found == fields.end() || !own.contains(key) || staged.states.contains(key)) continue;
      StateFields values;
      for (const auto& [field, key_of_field] : found->second) {
        at::Tensor value = files.read(key_of_field);
        const bool is_step = value.dim() == 0 && value.scalar_type() == at::kLong;
        values[field] = is_step ? value : value.to(item.tensor.device());
      }
      staged.states[key] = kind.state(values);
    }
  std::size_t number = 0;
  for (const auto& group : optimizer.param_groups()) {
    staged.options.push_back((group.has_options() ? group.options() : optimizer.defaults()).clone());
    kind.set_options(saved.at("groups").at(number++), *staged.options.back());
  }
  return staged;
}

void apply_optimizer(StagedOptimizer staged, torch::optim::Optimizer& optimizer) {
  optimizer.state().clear();
  for (auto& [key, state] : staged.states) optimizer.state()[key] = std::move(state);
  std::size_t number = 0;
  for (auto& group : optimizer.param_groups()) group.set_options(std::move(staged.options[number++]));
}

/// The saved state of this rank's generator; undefined where it does not apply.
at::Tensor staged_random(const CheckpointGroup& group, const Opened& checkpoint) {
  if (checkpoint.manifest.num_ranks != group.size()) return {};
  char file[48];
  std::snprintf(file, sizeof file, "random/rank-%05d.safetensors", group.rank());
  at::Tensor state = SafetensorsFile((checkpoint.folder / file).string()).read("cpu");
  at::detail::createCPUGenerator().set_state(state);  // throws where it is none
  return state;
}

/// The weights of a path that load_weights takes.
TensorFiles weights_at(const fs::path& path) {
  std::error_code error;
  const auto indexed = [](const fs::path& index) { return TensorFiles(index.parent_path(), read_index(index)); };
  if (!fs::is_directory(path, error)) return path.extension() == ".json" ? indexed(path) : TensorFiles(path);
  for (const fs::path& folder : {path, [&] {
                                   const auto complete = complete_checkpoints(path);
                                   return complete.empty() ? path : complete.rbegin()->second;
                                 }()}) {
    if (fs::exists(folder / "model.safetensors.index.json", error))
      return indexed(folder / "model.safetensors.index.json");
    if (fs::exists(folder / "model.safetensors", error)) return TensorFiles(folder / "model.safetensors");
  }
  throw InvalidArgument(str("there are no weights in ", path.string(),
                            ": neither model.safetensors.index.json nor model.safetensors, nor checkpoints"));
}

}  // namespace
}  // namespace detail

std::optional<std::int64_t> latest_checkpoint(const std::string& folder) {
  std::error_code error;
  if (!std::filesystem::exists(folder, error)) return std::nullopt;
  const auto complete = detail::complete_checkpoints(folder);
  if (complete.empty()) return std::nullopt;
  return complete.rbegin()->first;
}

CheckpointExtra load_checkpoint(const std::string& folder, torch::nn::Module& model,
                                torch::optim::Optimizer& optimizer) {
  using namespace detail;  // NOLINT(google-build-using-namespace): its own internals
  const CheckpointGroup group(model_state(model, false).communicator);
  const Opened checkpoint = open_checkpoint(group, folder);
  const Manifest& manifest = checkpoint.manifest;
  const ModelState state = model_state(model, manifest.stage_prefix);
  const WholeModel lines = gather_model(group, state, &optimizer);

  Staged weights;
  StagedOptimizer states;
  at::Tensor random;
  CheckpointExtra extra;
  group.on_all([&] {
    try {
      const TensorFiles files(checkpoint.folder, read_index(checkpoint.folder / "model.safetensors.index.json"));
      const FileNames names = file_names_of(lines, files, [](const std::string& name) { return name; });
      const std::string text = difference(lines, files, names, false, false);
      DUALPIPE_CHECK(text.empty(), "the checkpoint ", checkpoint.folder.string(), " is of another model", text,
                     manifest.stage_prefix ? "; its names begin with the stage, so it fits the same cut only" : "");
      const fs::path folder_of_states = checkpoint.folder / "optimizer";
      const TensorFiles state_files(folder_of_states,
                                    read_index(folder_of_states / "optimizer.safetensors.index.json"));
      const auto kind = kind_of(optimizer);
      check_optimizer(lines, state_files, manifest.optimizer, *kind, optimizer.param_groups().size());
      states = staged_optimizer(state, lines, state_files, manifest.optimizer, *kind, optimizer);
      weights = staged_weights(state, files, names.names);
      random = staged_random(group, checkpoint);
      extra.step = manifest.step;
      extra.values = values_of(manifest.values);
      if (manifest.files.contains("extra.safetensors")) {
        const SafetensorsFile tensors((checkpoint.folder / "extra.safetensors").string());
        for (const auto& [name, entry] : tensors.tensors()) extra.tensors[name] = tensors.read(name);
      }
    } catch (const Json::exception& error) {
      throw InvalidArgument(str(checkpoint.folder.string(), ": ", error.what()));
    }
  });

  apply_weights(weights, state);
  apply_optimizer(std::move(states), optimizer);
  if (state.pipe != nullptr) state.pipe->set_step(extra.step);
  if (random.defined()) {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard lock(generator.mutex());
    generator.set_state(random);
  }
  return extra;
}

void load_weights(const std::string& path, torch::nn::Module& model, const LoadWeightsOptions& options) {
  using namespace detail;  // NOLINT(google-build-using-namespace): its own internals
  const ModelState state = model_state(model, options.stage_prefix);
  const CheckpointGroup group(state.communicator);
  const WholeModel lines = gather_model(group, state, nullptr);
  Staged weights;
  group.on_all([&] {
    const TensorFiles files = weights_at(path);
    const FileNames names = file_names_of(
        lines, files, [&](const std::string& name) { return options.file_name ? options.file_name(name) : name; });
    const std::string text = difference(lines, files, names, true, options.allow_unused);
    DUALPIPE_CHECK(text.empty(), path, " does not fit the model", text);
    weights = staged_weights(state, files, names.names);
  });
  apply_weights(weights, state);
}

}  // namespace dualpipe
