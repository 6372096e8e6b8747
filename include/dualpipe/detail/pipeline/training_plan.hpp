#pragma once

#include <limits>
#include <map>
#include <string>

#include "dualpipe/config.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe {

/// The plan of a training step that the options ask for. @throws InvalidArgument
Plan training_plan(const DualPipeOptions& options, int num_ranks);

/// What all ranks must have alike of their options and of the schedule made of them.
std::string describe(const DualPipeOptions& options, const Schedule& schedule);

/// What all ranks must know of all stages.
struct StageTraits {
  bool communicate = false;                                   ///< some do
  int data_dependent_from = std::numeric_limits<int>::max();  ///< the first whose shapes depend on data
};
/// Collective.
///
/// @param stages  those of this rank.
StageTraits traits_of_all(Communicator& communicator, const std::map<int, Stage>& stages);

}  // namespace dualpipe
