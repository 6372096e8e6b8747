#pragma once

#include <functional>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// The data of one step: whole tensors that are split along one dimension into micro-batches, or micro-batches made by
/// hand. Each rank may pass only what it needs: inputs where it feeds the first stage, targets where it computes the
/// loss. Ranks that pass the same member must pass the same values.
struct Batch {
  Tensors inputs = {};                    ///< of the first stage
  Tensors targets = {};                   ///< given to the loss function
  Tensors extras = {};                    ///< side inputs that every stage sees (StageContext::extras); may be empty
  std::vector<Batch> micro_batches = {};  ///< set by from_micro_batches alone; then the tensors above are empty

  /// Micro-batch i is element i. Sizes may differ.
  DUALPIPE_DECL static Batch from_micro_batches(std::vector<Batch> micro_batches);
  bool empty() const noexcept { return inputs.empty() && targets.empty() && extras.empty() && micro_batches.empty(); }
};

/// From the outputs of the last stage and the targets of a micro-batch to a floating-point tensor of one element.
using LossFn = std::function<at::Tensor(const Tensors& outputs, const Tensors& targets)>;

/// Micro-batch i is the i-th of `count` equal slices (views) of every tensor along `dim`, or the i-th element made by
/// hand.
///
/// @throws InvalidArgument  a tensor that `count` does not divide along `dim`, or another number of micro-batches made
///                          by hand.
DUALPIPE_DECL std::vector<Batch> split_batch(const Batch& batch, int count, int dim);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/batch.ipp"
#endif
