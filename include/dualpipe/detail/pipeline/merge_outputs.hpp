#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe::detail {

/// Collective among `ranks` and those that run `stage`: what these have of every micro-batch, by micro-batch.
///
/// @param ranks  that get it, this one included.
/// @param mine   of the micro-batches that ran here.
DUALPIPE_DECL std::vector<Tensors> gather_from(Communicator& communicator, const Plan& plan, int stage,
                                               const std::vector<int>& ranks, std::map<int, Tensors> mine);

/// What predict() returns of the outputs of all micro-batches, as DualPipeOptions::merge_outputs says.
///
/// @param outputs  by micro-batch, not empty.
/// @param sizes    of the micro-batches along batch_dim; -1, or no number: unknown.
/// @throws InvalidArgument  outputs that do not merge so.
DUALPIPE_DECL Tensors merge_outputs(const std::vector<Tensors>& outputs, const std::vector<std::int64_t>& sizes,
                                    const DualPipeOptions& options);

/// "concat along dimension 0", "stack along dimension 0" or "list".
DUALPIPE_DECL std::string merge_text(const Merge& merge);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/merge_outputs.ipp"
#endif
