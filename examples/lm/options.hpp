#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/config.hpp"
#include "model.hpp"

namespace lm {

/// Everything a user can set, with the values of a run without arguments.
struct Options {
  std::vector<std::filesystem::path> text;  ///< empty: default_text()
  dualpipe::DualPipeOptions pipe{.num_micro_batches = 20};
  ModelSize model;

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

  std::filesystem::path trace = "out/dualpipe-lm.trace.json";  ///< empty: not written
  std::filesystem::path svg = "out/dualpipe-lm.svg";
  bool quiet = false;  ///< no picture of the schedule, no line per step
};

/// @return  none where only the help was asked for; then `help` holds it.
/// @throws dualpipe::InvalidArgument  an unknown flag, a value out of range, a configuration file that does not read.
std::optional<Options> parse(int argc, const char* const* argv, std::string& help);

}  // namespace lm
