#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <set>
#include <system_error>
#include <utility>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/train/checkpoint.hpp"
#include "train/checkpoint/group.hpp"
#include "train/checkpoint/manifest.hpp"
#include "train/checkpoint/model_state.hpp"
#include "train/checkpoint/optimizer_state.hpp"
#include "train/checkpoint/unfinished_checkpoint.hpp"
#include "train/checkpoint/values.hpp"
#include "train/safetensors/file.hpp"

namespace dualpipe {
namespace detail {

/// What one rank has to write.
struct RankState {
  std::vector<TensorLine> lines;
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, StateFields> states;  // of the optimizer, by parameter
};

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

at::Tensor random_state() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard lock(generator.mutex());
  return generator.get_state();
}

std::string random_token() {
  std::random_device random;
  return str(std::hex, random(), "-", random());
}

RankState state_of_rank(const ModelState& model, const OptimizerKind& kind, const torch::optim::Optimizer& optimizer) {
  RankState rank;
  const std::map<const void*, int> groups = group_indices(optimizer, model);
  for (const StageState& stage : model.stages)
    for (const auto& [name, item] : stage.tensors) {
      TensorLine line = line_of(name, item, stage.number);
      rank.tensors[name] = item.tensor.detach();
      if (const auto group = groups.find(item.tensor.unsafeGetTensorImpl()); group != groups.end())
        line.group = group->second;
      const auto state = optimizer.state().find(item.tensor.unsafeGetTensorImpl());
      if (state != optimizer.state().end()) {
        rank.states[name] = kind.fields(*state->second);
        for (const auto& [field, value] : rank.states[name]) {
          safetensors_dtype(str("optimizer state ", field, " of ", name), value);
          line.fields.push_back(field);
        }
      }
      rank.lines.push_back(std::move(line));
    }
  return rank;
}

/// Which file has the tensors of a stage that a rank writes: stage-00012.safetensors, and where several ranks write
/// tensors of the stage, stage-00012.1.safetensors of the second.
class StageFiles {
 public:
  void add(int stage, int rank) { ranks_[stage].insert(rank); }
  std::string name(int stage, int rank) const {
    const std::set<int>& ranks = ranks_.at(stage);
    const auto place = std::distance(ranks.begin(), ranks.find(rank));
    return numbered_name("stage-", stage, place == 0 ? ".safetensors" : str(".", place, ".safetensors").c_str());
  }

 private:
  std::map<int, std::set<int>> ranks_;
};

/// Where the tensors of the model and the states of the optimizer go, by name: the same on all ranks.
struct Places {
  explicit Places(const WholeModel& model) {
    StageFiles weight_files, state_files;
    for (const auto& [name, tensor] : model) {
      weight_files.add(tensor.stage, tensor.rank);
      if (tensor.state_rank >= 0) state_files.add(tensor.stage, tensor.state_rank);
    }
    for (const auto& [name, tensor] : model) {
      weights[name] = weight_files.name(tensor.stage, tensor.rank);
      for (const std::string& field : tensor.fields)
        states[name + "." + field] = state_files.name(tensor.stage, tensor.state_rank);
    }
  }
  std::map<std::string, std::string> weights, states;
};

Shards shards_of(const RankState& state, const WholeModel& model, const Places& places, int rank) {
  Shards shards;
  for (const auto& [name, tensor] : state.tensors)
    if (model.at(name).rank == rank) shards[places.weights.at(name)][name] = tensor;
  for (const auto& [name, fields] : state.states)
    if (model.at(name).state_rank == rank)
      for (const auto& [field, value] : fields) {
        const std::string key = name + "." + field;
        shards["optimizer/" + places.states.at(key)][key] = value.detach();
      }
  return shards;
}

constexpr const char* token_name = "token";

}  // namespace
}  // namespace detail

class CheckpointWriter::Impl {
 public:
  Impl(std::string folder, CheckpointOptions options) : root_(std::move(folder)), options_(options) {
    DUALPIPE_CHECK(options.keep >= 0, "CheckpointOptions::keep must be >= 0, got ", options.keep);
    DUALPIPE_CHECK(!root_.empty(), "checkpoints need a folder, got an empty path");
  }

  void save(const torch::nn::Module& model, const torch::optim::Optimizer& optimizer, const CheckpointExtra& extra) {
    using namespace detail;  // NOLINT(google-build-using-namespace): its own internals
    wait();
    const ModelState state = model_state(model, options_.stage_prefix);
    const CheckpointGroup group(state.communicator);
    Shards shards;
    std::optional<Completion> whole = prepare(state, group, optimizer, extra, shards);

    const fs::path partial = root_ / (step_name(extra.step) + ".partial");
    std::string token;
    group.on_rank(0, [&] {
      token = random_token();
      whole->manifest.token = token;
      whole->root = root_;
      whole->partial = partial;
      make_folder(partial, extra.step, token);
    });
    const std::string expected = group.gather(token)[0];
    const std::string finding = finding_of([&] {
      std::error_code ignored;
      const fs::path path = partial / token_name;
      DUALPIPE_CHECK(fs::exists(path, ignored) && read_file(path.string()) == expected, "cannot see in ",
                     root_.string(), " what rank 0 has written there; all ranks need one shared folder");
    });
    const std::vector<std::string> findings = group.gather(finding);
    if (group.rank() == 0 &&
        std::any_of(findings.begin(), findings.end(), [](const auto& text) { return !text.empty(); })) {
      std::error_code ignored;
      fs::remove_all(partial, ignored);
    }
    throw_findings(findings, group.numbers());

    if (group.rank() == 0) {
      for (const auto& [name, tensor] : extra.tensors) shards["extra.safetensors"][name] = tensor.detach();
    }
    shards["random/" + numbered_name("rank-", group.rank(), ".safetensors")]["cpu"] = random_state();
    if (options_.asynchronous) {
      group.on_all([&] {
        for (auto& [file, tensors] : shards)
          for (auto& [name, tensor] : tensors) tensor = tensor.to(at::kCPU, /*non_blocking=*/false, /*copy=*/true);
      });
    }
    unfinished_ = std::make_unique<UnfinishedCheckpoint>(group, partial, std::move(shards), std::move(whole));
    if (options_.asynchronous)
      unfinished_->write_in_background();
    else
      unfinished_->write();
  }

  void wait() {
    const auto unfinished = std::move(unfinished_);
    if (unfinished) unfinished->wait();
  }

  bool is_asynchronous() const { return options_.asynchronous; }

 private:
  /// Collective: what all ranks write, checked before anything is.
  ///
  /// @param shards  that this rank writes.
  /// @return        on rank 0.
  std::optional<detail::Completion> prepare(const detail::ModelState& state, const detail::CheckpointGroup& group,
                                            const torch::optim::Optimizer& optimizer, const CheckpointExtra& extra,
                                            detail::Shards& shards) const {
    using namespace detail;  // NOLINT(google-build-using-namespace): its own internals
    Json statement;
    std::string text;
    RankState mine;
    const std::string finding = finding_of([&] {
      DUALPIPE_CHECK(extra.step >= 0, "the step of a checkpoint must be >= 0, got ", extra.step);
      for (const auto& [name, tensor] : extra.tensors) safetensors_dtype("the extra tensor " + name, tensor);
      const auto kind = kind_of(optimizer);
      mine = state_of_rank(state, *kind, optimizer);
      statement = {{"step", extra.step},
                   {"values", json_of(extra.values)},
                   {"optimizer", {{"kind", kind->name()}, {"groups", group_options(*kind, optimizer)}}},
                   {"keep", options_.keep},
                   {"asynchronous", options_.asynchronous},
                   {"stage_prefix", options_.stage_prefix}};
      try {
        text = Json{{"statement", statement.dump()}, {"lines", mine.lines}}.dump();
      } catch (const Json::exception& error) {
        throw InvalidArgument(str("a name or value is no UTF-8: ", error.what()));
      }
    });
    throw_findings(group.gather(finding), group.numbers());
    std::vector<std::vector<TensorLine>> lines;
    std::string first;
    const std::vector<int> numbers = group.numbers();
    for (const std::string& each : group.gather(text)) {
      const Json json = Json::parse(each);
      const auto stated = json.at("statement").get<std::string>();
      if (lines.empty()) first = stated;
      DUALPIPE_CHECK(stated == first, "ranks disagree about a checkpoint:\n  rank ", numbers[0], ": ", first,
                     "\n  rank ", numbers[lines.size()], ": ", stated);
      lines.push_back(json.at("lines").get<std::vector<TensorLine>>());
    }
    const WholeModel model = whole_model(lines, numbers);
    Places places(model);
    shards = shards_of(mine, model, places, group.rank());
    if (group.rank() != 0) return std::nullopt;

    Completion whole;
    whole.keep = options_.keep;
    Manifest& manifest = whole.manifest;
    manifest.step = extra.step;
    manifest.num_ranks = group.size();
    manifest.stage_prefix = options_.stage_prefix;
    manifest.optimizer = statement["optimizer"];
    manifest.values = statement["values"];
    manifest.run = Json::object();
    if (state.pipe != nullptr) {
      const Schedule& schedule = state.pipe->schedule();
      manifest.run = {{"schedule", schedule.name},
                      {"num_stages", schedule.num_stages},
                      {"num_micro_batches", schedule.num_micro_batches},
                      {"num_replicas", group.size() / state.pipe->communicator()->size()}};
    }
    Json& group_of = manifest.optimizer["group_of"] = Json::object();
    for (const auto& [name, tensor] : model)
      if (tensor.group >= 0 && optimizer.param_groups().size() > 1) group_of[name] = tensor.group;
    whole.weights = std::move(places.weights);
    whole.states = std::move(places.states);
    return whole;
  }

  void make_folder(const std::filesystem::path& partial, std::int64_t step, const std::string& token) const {
    namespace fs = std::filesystem;
    std::error_code error;
    fs::create_directories(root_, error);
    DUALPIPE_CHECK(!error, "cannot make the folder ", root_.string(), ": ", error.message());
    const auto existing = detail::complete_checkpoints(root_);
    if (!existing.empty()) {
      const auto& [latest, path] = *existing.rbegin();
      DUALPIPE_CHECK(latest <= step, "cannot save step ", step, ": ", root_.string(), " has the later step ", latest,
                     ", which load_checkpoint would take; remove it or use another folder");
    }
    detail::remove_incomplete(root_);
    for (const char* folder : {"optimizer", "random"}) {
      fs::create_directories(partial / folder, error);
      DUALPIPE_CHECK(!error, "cannot make the folder ", (partial / folder).string(), ": ", error.message());
    }
    detail::write_file((partial / detail::token_name).string(), token);
  }

  std::filesystem::path root_;
  CheckpointOptions options_;
  std::unique_ptr<detail::UnfinishedCheckpoint> unfinished_;
};

CheckpointWriter::CheckpointWriter(std::string folder, CheckpointOptions options)
    : impl_(std::make_unique<Impl>(std::move(folder), options)) {}
CheckpointWriter::~CheckpointWriter() = default;

void CheckpointWriter::save(const torch::nn::Module& model, const torch::optim::Optimizer& optimizer,
                            const CheckpointExtra& extra) {
  impl_->save(model, optimizer, extra);
  if (!impl_->is_asynchronous()) impl_->wait();
}

void CheckpointWriter::wait() { impl_->wait(); }

void save_checkpoint(const std::string& folder, const torch::nn::Module& model,
                     const torch::optim::Optimizer& optimizer, const CheckpointExtra& extra,
                     const CheckpointOptions& options) {
  CheckpointWriter writer(folder, options);
  writer.save(model, optimizer, extra);
  writer.wait();
}

}  // namespace dualpipe
