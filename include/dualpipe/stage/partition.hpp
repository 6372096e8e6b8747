#pragma once

#include <functional>
#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/stage/as_stage.hpp"

namespace dualpipe {

/// One layer of a sequential model. In its stage's module, names begin with `name.`, whatever the cut.
struct NamedLayer {
  std::string name;  ///< unique in the model, not empty; dots make levels as in "encoder.layers.0", as a model built of
                     ///< modules has
  /// Called on the ranks that hold the layer, once for each of their stages that contains it.
  std::function<Stage()> make;
};

/// Cuts consecutive layers into `num_stages` stages so that the costliest stage is as cheap as possible.
///
/// The module of a stage holds each layer's module under the layer's name. The stage takes what its first layer takes,
/// and splits its backward only where all its layers do.
///
/// @param costs  relative cost of each layer, all > 0; empty: all equal.
/// @throws InvalidArgument  fewer layers than stages, another number of costs than layers, a cost that is not
///                          positive and finite, a layer without function, a name that is empty, used twice, or inside
///                          of another layer's ("a" and "a.b"). The factory throws it for a stage that is not in
///                          [0, num_stages).
DUALPIPE_DECL StageFactory split(std::vector<NamedLayer> layers, int num_stages, std::vector<double> costs = {});

/// The cut that `split` makes: stage s takes layers [cuts[s], cuts[s+1]); num_stages + 1 numbers.
///
/// The costliest stage is as cheap as any cut allows, every stage has a layer, and within these limits each stage takes
/// what is nearest to an equal share of what is left. The same arguments give the same cut everywhere. Takes a few
/// milliseconds for thousands of layers.
///
/// @throws InvalidArgument  as for `split`.
DUALPIPE_DECL std::vector<int> balance(const std::vector<double>& costs, int num_stages);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/stage/partition.ipp"
#endif
