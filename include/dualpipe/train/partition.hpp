#pragma once

#include <string>
#include <vector>

#include "dualpipe/runtime/stage.hpp"

namespace dualpipe {

/// One layer of a sequential model. Checkpoint keys are `name.` plus the name inside the layer, whatever the layout.
struct NamedLayer {
  std::string name;                                        ///< unique in the model, not empty
  std::function<Stage()> make;                             ///< called on the ranks that hold the layer, once for each of their stages that contains it
};

/// Cuts consecutive layers into `num_stages` stages so that the costliest stage is as cheap as possible.
///
/// @param costs  relative cost of each layer, all > 0; empty: all equal.
/// @throws InvalidArgument  fewer layers than stages, another number of costs than layers, a cost that is not positive and finite, a name that is empty or used twice.
StageFactory split(std::vector<NamedLayer> layers, int num_stages, std::vector<double> costs = {});

/// The cut that `split` makes: stage s takes layers [cuts[s], cuts[s+1]); num_stages + 1 numbers.
std::vector<int> balance(const std::vector<double>& costs, int num_stages);

}  // namespace dualpipe
