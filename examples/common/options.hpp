#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/config.hpp"
#include "model_size.hpp"

namespace example {

/// What a user can set of a training run, whatever the model.
struct Options {
  std::string program;  ///< its name, which its files have too

  std::vector<std::filesystem::path> text;  ///< empty: default_text()
  dualpipe::DualPipeOptions pipe{.num_micro_batches = 20};
  at::DeviceType device = at::kCPU;  ///< kCUDA: a GPU for each rank
  /// Of the layers into stages, an entry for each: how many it takes, or FIRST:LAST. Empty: balanced by cost.
  std::vector<std::string> partition;
  int pipelines = 1;    ///< side by side, each of world size / pipelines ranks
  int num_sharing = 1;  ///< pipelines that share one set of experts
  std::chrono::nanoseconds latency{0};
  double bytes_per_second = 0;  ///< of each link, 0: as fast as it is

  ModelSize model;
  at::ScalarType dtype = at::kFloat;  ///< of parameters and of what flows between layers; losses are float32

  int steps = 600;
  double minutes = 2.5;  ///< 0: no limit
  int batch = 1;         ///< sequences in a micro-batch
  double learning_rate = 5e-3;
  double warm_up = 0.05;  ///< share of the run in which the learning rate rises to its full value
  double weight_decay = 0.1;
  double clip = 1.0;
  std::uint64_t seed = 1;

  int held_out = 8;  ///< evaluation batches, each of as many sequences as a step
  int sample = 400;  ///< bytes to generate
  double temperature = 0.8;
  std::optional<std::string> prompt;  ///< none: the beginning of the held-out text

  std::filesystem::path checkpoint;  ///< empty: none are saved
  int checkpoint_every = 100;        ///< steps; at the end of the run too
  bool resume = false;               ///< goes on from the last checkpoint, if there is one
  std::filesystem::path metrics;     ///< empty: not written

  std::filesystem::path trace;  ///< empty: not written
  std::filesystem::path svg;
  bool quiet = false;   ///< no picture of the schedule, no progress
  double progress = 5;  ///< seconds between lines of progress, 0: a line for every step
};

}  // namespace example
