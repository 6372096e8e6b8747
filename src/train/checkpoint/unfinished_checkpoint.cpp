#include "train/checkpoint/unfinished_checkpoint.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <system_error>
#include <utility>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "train/safetensors/file.hpp"

namespace dualpipe::detail {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr auto poll_interval = std::chrono::milliseconds(20);

/// Files and the bytes of their tensors.
struct Written {
  FileRecords records;
  std::uint64_t weight_bytes = 0, state_bytes = 0;
};

Json json_of(const std::string& finding, const Written& written) {
  Json files = Json::object();
  for (const auto& [path, record] : written.records) files[path] = {record.bytes, record.xxh64};
  return {{"finding", finding}, {"files", files}, {"weights", written.weight_bytes}, {"states", written.state_bytes}};
}

/// @return  what failed there; empty: nothing.
std::string add_written(const Json& json, Written& written) {
  for (const auto& [path, record] : json.at("files").items())
    written.records[path] = {record.at(0).get<std::uint64_t>(), record.at(1).get<std::string>()};
  written.weight_bytes += json.at("weights").get<std::uint64_t>();
  written.state_bytes += json.at("states").get<std::uint64_t>();
  return json.at("finding").get<std::string>();
}

Written write_shards(const fs::path& partial, const Shards& shards) {
  const std::map<std::string, std::string> metadata{{"format", "pt"}};  // some readers insist on it
  Written written;
  for (const auto& [file, tensors] : shards) {
    const bool is_weights = file.starts_with("stage-");
    const bool is_states = file.starts_with("optimizer/");
    for (const auto& [name, tensor] : tensors) {
      if (is_weights) written.weight_bytes += tensor.nbytes();
      if (is_states) written.state_bytes += tensor.nbytes();
    }
    written.records[file] = write_recorded(
        partial / file, [&, &content = tensors](const Sink& sink) { stream_safetensors(content, metadata, sink); });
  }
  return written;
}

void complete(const Completion& whole, const Written& written) {
  Manifest manifest = whole.manifest;
  manifest.files = written.records;
  const auto write_text = [&](const std::string& file, const std::string& text) {
    return write_recorded(whole.partial / file, [&](const Sink& sink) { sink(text); });
  };
  const std::string weights = "model.safetensors.index.json", states = "optimizer/optimizer.safetensors.index.json";
  manifest.files[weights] = write_text(weights, index_text(written.weight_bytes, whole.weights));
  manifest.files[states] = write_text(states, index_text(written.state_bytes, whole.states));
  // What ranks told each other through the folder is no part of the checkpoint.
  for (const auto& entry : fs::directory_iterator(whole.partial))
    if (entry.is_regular_file() && !manifest.files.contains(entry.path().filename().string())) fs::remove(entry.path());
  for (const char* folder : {"optimizer", "random"}) sync_folder((whole.partial / folder).string());
  write_text(manifest_name, manifest.text());
  sync_folder(whole.partial.string());
  rename_checkpoint(whole.partial, whole.root / step_name(manifest.step));
  sync_folder(whole.root.string());
  std::map<std::int64_t, fs::path> kept = complete_checkpoints(whole.root);
  while (whole.keep > 0 && std::ssize(kept) > whole.keep) {
    remove_checkpoint(kept.begin()->second);
    kept.erase(kept.begin());
  }
}

}  // namespace

std::string numbered_name(const char* prefix, int number, const char* suffix) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "%05d", number);
  return str(prefix, digits, suffix);
}

UnfinishedCheckpoint::UnfinishedCheckpoint(CheckpointGroup group, fs::path partial, Shards shards,
                                           std::optional<Completion> whole)
    : group_(std::move(group)), partial_(std::move(partial)), shards_(std::move(shards)), whole_(std::move(whole)) {}

UnfinishedCheckpoint::~UnfinishedCheckpoint() { stop(); }

void UnfinishedCheckpoint::write() {
  Written written;
  const std::string finding = finding_of([&] { written = write_shards(partial_, shards_); });
  shards_.clear();
  mine_ = json_of(finding, written);
}

void UnfinishedCheckpoint::write_in_background() {
  thread_ = std::thread([this] {
    write();
    const std::string finding = finding_of([&] { meet_in_folder(); });
    if (!finding.empty()) finding_ = finding;
  });
}

void UnfinishedCheckpoint::meet_in_folder() {
  const auto path_of = [&](int rank) { return partial_ / numbered_name("record-", rank, ".json"); };
  if (!whole_) return write_file(path_of(group_.rank()).string(), mine_.dump(-1, ' ', true));
  std::map<int, Json> records{{0, mine_}};
  while (std::ssize(records) < group_.size()) {
    {
      std::unique_lock lock(mutex_);
      if (stop_.wait_for(lock, poll_interval, [&] { return stopping_; })) return;
    }
    for (int rank = 1; rank < group_.size(); ++rank) {
      std::error_code ignored;
      if (!records.contains(rank) && fs::exists(path_of(rank), ignored))
        records[rank] = Json::parse(read_file(path_of(rank).string()));
    }
  }
  finish(records);
}

void UnfinishedCheckpoint::wait() {
  stop();  // before any rank can remove what this one still writes
  std::map<int, Json> records;
  std::vector<std::string> findings;
  for (const std::string& text : group_.gather(mine_.dump(-1, ' ', true))) {
    const int rank = static_cast<int>(records.size());
    records[rank] = Json::parse(text);
    findings.push_back(records[rank].at("finding").get<std::string>());
  }
  group_.on_all([&] {
    if (whole_ && !finished_) finish(records);
    if (whole_ && !finding_.empty()) {
      std::error_code ignored;
      fs::remove_all(partial_, ignored);
    }
    throw_findings(findings, group_.numbers());
    DUALPIPE_CHECK(!whole_ || finding_.empty(), finding_);
  });
}

void UnfinishedCheckpoint::finish(const std::map<int, Json>& records) {
  finished_ = true;
  Written written;
  for (const auto& [rank, record] : records)
    if (const std::string finding = add_written(record, written); !finding.empty()) {
      finding_ = finding;
      return;
    }
  finding_ = finding_of([&] { complete(*whole_, written); });
}

void UnfinishedCheckpoint::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  if (thread_.joinable()) thread_.join();
}

}  // namespace dualpipe::detail
