#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe::detail {

/// Collective among the ranks that run the last stage: the outputs of every micro-batch, by micro-batch.
///
/// @param ranks    those ranks, this one included.
/// @param outputs  of the micro-batches whose last stage ran here.
DUALPIPE_DECL std::vector<Tensors> gather_outputs(Communicator& communicator, const Plan& plan,
                                                  const std::vector<int>& ranks, std::map<int, Tensors> outputs);

/// Each output of all micro-batches as one tensor, concatenated along `dim`.
///
/// @param outputs  by micro-batch, not empty.
/// @param sizes    of the micro-batches along `dim`; -1, or no number: unknown.
/// @throws InvalidArgument  outputs that do not have one slice along `dim` for each sample of their micro-batch.
DUALPIPE_DECL Tensors merge_outputs(const std::vector<Tensors>& outputs, const std::vector<std::int64_t>& sizes,
                                    int dim);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/merge_outputs.ipp"
#endif
