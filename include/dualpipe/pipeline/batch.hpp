#pragma once

#include <vector>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe {

/// The data of one step: whole tensors that are split along one dimension into micro-batches, or micro-batches made by
/// hand.
struct Batch {
  Tensors inputs = {};                    ///< of the first stage
  Tensors targets = {};                   ///< given to the loss function
  Tensors extras = {};                    ///< side inputs that every stage sees (StageContext::extras); may be empty
  std::vector<Batch> micro_batches = {};  ///< set by from_micro_batches alone; then the tensors above are empty

  /// Micro-batch i is element i, whatever its size; sizes may differ.
  static Batch from_micro_batches(std::vector<Batch> micro_batches);
  bool empty() const noexcept { return inputs.empty() && targets.empty() && extras.empty() && micro_batches.empty(); }
};

/// Micro-batch i is the i-th of `count` equal slices (views) of every tensor along `dim`, or the i-th element made by
/// hand.
///
/// @throws InvalidArgument  a tensor that `count` does not divide along `dim`, or another number of micro-batches made
/// by hand.
std::vector<Batch> split_batch(const Batch& batch, int count, int dim);

/// A number that differs when dtypes, sizes or values do, comparable between processes.
std::uint64_t checksum(const Batch& batch);

}  // namespace dualpipe
