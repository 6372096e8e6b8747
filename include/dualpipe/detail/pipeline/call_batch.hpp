#pragma once

#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/call_statement.hpp"
#include "dualpipe/pipeline/batch.hpp"

namespace dualpipe::detail {

/// What one rank does with the batch of a call.
struct BatchUse {
  int rank = 0;  ///< of the world
  bool feeds_inputs = false;
  bool computes_loss = false;  ///< in this call: false in predictions
  int num_micro_batches = 0;   ///< of a whole batch
  int batch_dim = 0;
  BatchSplit split = {};
  bool trains = false;
  bool sizes = false;  ///< say how large each micro-batch is
};

/// The micro-batches that this rank needs, empty where it needs none; fills in what the statement says of them.
///
/// @throws InvalidArgument  the batch does not split, lacks what this rank needs, or has in training a tensor that
///                          requires grad and is no leaf among the inputs.
DUALPIPE_DECL std::vector<Batch> prepare(const Batch& batch, const BatchUse& use, CallStatement& statement);

/// Whether a step is asked for gradients of inputs.
DUALPIPE_DECL bool wants_input_gradients(const std::vector<Batch>& micro_batches);
/// As StepResult::input_gradients.
///
/// @param micro_batches  of the batch.
/// @param gradients      by micro-batch: of those of its inputs that require grad.
DUALPIPE_DECL Tensors input_gradients(const Batch& batch, const std::vector<Batch>& micro_batches,
                                      const std::vector<Tensors>& gradients, const DualPipeOptions& options);

/// Collective over a pipeline: what this rank needs of the batch of its rank 0.
///
/// @param feeding, losing  ranks that need inputs, and targets. All need the extras.
DUALPIPE_DECL Batch sent_batch(Communicator& pipeline, const Batch& batch, const std::vector<int>& feeding,
                               const std::vector<int>& losing);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/call_batch.ipp"
#endif
