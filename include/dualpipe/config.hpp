#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe {

enum class LossReduction { mean, sum };

/// In what the gradients of bfloat16 and float16 parameters are accumulated over micro-batches, summed over ranks and
/// handed out. Those of other parameters have the dtype of their parameter.
enum class GradientDtype { parameter, float32 };

/// What happens to a step with a loss or a gradient that is infinite or NaN, alike on all ranks.
enum class OnNonFinite {
  error,  ///< step() throws InvalidArgument on all ranks; gradients and buffers are what they were
  skip,   ///< the same without an exception: StepResult::skipped says so
  keep    ///< nobody looks, and the gradients are handed out
};

/// How predict() makes an output of the whole batch from that of each micro-batch.
struct Merge {
  enum class How {
    concat,  ///< along `dim`, the only dimension in which the sizes may differ
    stack,   ///< along a new dimension `dim`, with one entry per micro-batch; the sizes are equal
    list     ///< not at all: the tensors of all micro-batches, in their order; any sizes and dtypes
  };
  How how = How::concat;
  int dim = 0;
  bool operator==(const Merge&) const = default;
};

/// How a tensor of a whole batch is shared out to the micro-batches, as Merge puts outputs together.
struct Split {
  enum class How {
    chunk,  ///< slices along `dim`, in their order
    whole,  ///< every micro-batch gets all of it
    list    ///< takes one place for each micro-batch: the next tensor of the list is that of the next micro-batch
  };
  How how = How::chunk;
  int dim = 0;
  bool operator==(const Split&) const = default;
};
/// One entry for each tensor of a member of Batch, a list counted once. Empty: slices along batch_dim.
struct BatchSplit {
  std::vector<Split> inputs = {}, targets = {}, extras = {};
  bool operator==(const BatchSplit&) const = default;
};

/// How the copies of a buffer become one after a step in which each holder of its stage has run other micro-batches.
enum class BufferReduction {
  broadcast,  ///< the value of the lowest holder replaces the others'
  sum,        ///< it grows by the sum of what it has grown by on each holder: counters, exact for integers
  mean,       ///< it grows by the mean of that: running statistics; floating point
  local       ///< each holder keeps its own, which is not compared
};

/// Members in the order in which a reader sets them.
struct DualPipeOptions {
  int num_micro_batches = 0;          ///< per step and replica, both directions together, where the batch is whole
  std::string schedule = "dualpipe";  ///< a kind (see schedule_kinds), or the path of a CSV file
  int chunks_per_rank = 2;            ///< interleaved only
  Publish publish = Publish::early;
  LossReduction loss_reduction =
      LossReduction::mean;  ///< each micro-batch loss is scaled by 1/N (mean; N over all replicas) or 1 (sum); with
                            ///< Batch::weights by its part of their sum, or by its weight
  GradientDtype gradient_dtype = GradientDtype::parameter;
  OnNonFinite on_non_finite = OnNonFinite::error;
  int batch_dim = 0;      ///< dimension that is split into micro-batches
  BatchSplit split = {};  ///< of tensors that split otherwise
  /// What predict() returns, for each output of the last stage. Empty: all by concat along batch_dim, where an output
  /// has one entry for each sample of its micro-batch.
  std::vector<Merge> merge_outputs = {};
  /// Of all random numbers: each layer that split() cut draws what follows from the seed, the step, its name and the
  /// micro-batch (layer_seed), its first weights what follows from the seed and its name, whatever the schedule and the
  /// number of ranks. None: LibTorch's own seed, if all ranks are processes that have the same one, as after
  /// torch::manual_seed at the top of the program; else random numbers are left alone. See docs/training.md.
  std::optional<std::uint64_t> seed = {};
  bool keep_outputs = false;  ///< step() and evaluate() return this rank's last-stage outputs, detached
  bool asynchronous = false;  ///< CUDA: do not wait at the end of a step; results hold after StepResult::wait(). See
                              ///< DualPipeImpl::step on failures
  int compare_replicas_every = 100;  ///< steps: the copies of a stage on several ranks are compared bit by bit in the
                                     ///< first and every such step, 0: never; see DualPipeImpl::step
  /// By name, which is that of a buffer or its end behind a dot, the longest that fits: {{"running_mean",
  /// BufferReduction::mean}}. Others are broadcast where they are floating-point numbers, else local and compared.
  std::map<std::string, BufferReduction> buffers = {};
  /// Each parameter has one owner among the ranks that hold it, in all replicas: there alone are its summed gradient and
  /// its optimizer state. Train with a ShardedOptimizer, which needs DualPipeImpl::owned_parameters().
  bool shard_optimizer = false;
  /// A folder, made if there is none: when the pipeline fails, each rank that can leaves what it did last in
  /// `rank-<number>.json` there, for `dualpipe-plan report`. Empty: no files.
  std::string record_to = {};
  int num_ranks = 0;  ///< when not 0, must equal the number of ranks of the pipeline

  /// Reads a JSON object whose keys are the members above; merge_outputs is a list as in
  /// [{"how": "stack", "dim": 1}, {"how": "list"}], split is as {"inputs": [{"dim": 1}, {"how": "whole"}]}, and buffers an
  /// object as in {"running_mean": "mean"}.
  ///
  /// @throws InvalidArgument  unreadable file, malformed JSON, an unknown or mistyped key; the text names the file, the
  /// key and what is allowed.
  static DualPipeOptions from_json_file(const std::string& path);
  /// The same from text; `origin` names it in errors.
  static DualPipeOptions from_json(const std::string& text, const std::string& origin = "JSON text");
};

}  // namespace dualpipe
