#pragma once

#include <ATen/core/Tensor.h>

#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>

#include "train/checkpoint/group.hpp"
#include "train/checkpoint/manifest.hpp"

namespace dualpipe::detail {

/// "stage-", 12, ".safetensors": "stage-00012.safetensors"
std::string numbered_name(const char* prefix, int number, const char* suffix);

using Shards = std::map<std::string, std::map<std::string, at::Tensor>>;  // by path within the checkpoint, by name

/// What rank 0 needs to complete a checkpoint.
struct Completion {
  std::filesystem::path root, partial;
  Manifest manifest;
  std::map<std::string, std::string> weights, states;  // name to file
  int keep = 0;
};

/// A checkpoint between save() and wait().
class UnfinishedCheckpoint {
 public:
  /// @param partial  exists, with its folders.
  /// @param whole    on rank 0.
  UnfinishedCheckpoint(CheckpointGroup group, std::filesystem::path partial, Shards shards,
                       std::optional<Completion> whole);
  /// Waits for this rank's files, not for peers.
  ~UnfinishedCheckpoint();
  UnfinishedCheckpoint(const UnfinishedCheckpoint&) = delete;
  UnfinishedCheckpoint& operator=(const UnfinishedCheckpoint&) = delete;

  /// Writes this rank's files; what fails is told by wait().
  void write();
  /// The same on a thread; that of rank 0 completes the checkpoint when the files of all ranks are there.
  void write_in_background();
  /// Collective: completes it, if that has not happened. @throws InvalidArgument  on all ranks.
  void wait();

 private:
  /// @param records  of all ranks.
  void finish(const std::map<int, nlohmann::json>& records);
  void meet_in_folder();
  /// Returns when this rank's files are written.
  void stop();

  CheckpointGroup group_;
  std::filesystem::path partial_;
  Shards shards_;
  std::optional<Completion> whole_;
  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  // Of the thread, and after it of wait().
  nlohmann::json mine_;  // what this rank wrote
  bool finished_ = false;
  std::string finding_;
};

}  // namespace dualpipe::detail
