#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>

#include "dualpipe/config.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe::detail {

/// The plan of a training step that the options ask for.
///
/// @param pipeline      the ranks of one pipeline.
/// @param num_replicas  of the pipeline.
/// @throws InvalidArgument
DUALPIPE_DECL std::shared_ptr<const Plan> training_plan(const DualPipeOptions& options, Communicator& pipeline,
                                                        int num_replicas);
/// The same schedule where stages have collectives.
DUALPIPE_DECL std::shared_ptr<const Plan> communicating_plan(const Plan& plan, Communicator& pipeline,
                                                             int num_replicas);

/// The plan of a training step with another number of micro-batches, on the same ranks and stages: the kind's order for
/// so many, or else for the next larger number that it takes, without those that are not there.
///
/// @throws InvalidArgument  there is none: more micro-batches than the schedule of a file has, or too many.
DUALPIPE_DECL std::shared_ptr<const Plan> resized_plan(const Plan& plan, const DualPipeOptions& options,
                                                       int num_micro_batches, Communicator& pipeline, int num_replicas,
                                                       bool communicates);
/// The number of micro-batches whose order is run for these; another one where some are left out of it.
DUALPIPE_DECL int ordered_micro_batches(const Plan& plan, const DualPipeOptions& options, int num_micro_batches);

/// The options and the schedule made of them, as far as all ranks must have the same.
DUALPIPE_DECL std::string describe(const DualPipeOptions& options, const Plan& plan);

/// What every rank must know of the stages of all ranks.
struct StageTraits {
  bool communicate = false;                                   ///< some stage has a collective
  int data_dependent_from = std::numeric_limits<int>::max();  ///< the first whose shapes depend on data
  std::int64_t run = 0;  ///< tells this pipeline from others: a time of the first rank
};
/// Collective.
///
/// @param stages  those of this rank.
DUALPIPE_DECL StageTraits traits_of_all(Communicator& communicator, const std::map<int, Stage>& stages);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/training_plan.ipp"
#endif
