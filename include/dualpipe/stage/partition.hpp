#pragma once

#include <functional>
#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/stage/as_stage.hpp"

namespace torch::nn {
class Sequential;
}

namespace dualpipe {

/// One layer of a sequential model. In its stage's module, names begin with `name.`, whatever the cut.
struct NamedLayer {
  std::string name;  ///< unique in the model, not empty; dots make levels as in "encoder.layers.0", as a model built of
                     ///< modules has
  /// Called on the ranks that hold the layer, once for each of their stages that contains it.
  std::function<Stage()> make;
};

/// The layers of a model that is a Sequential, with its names for them: those that its checkpoints have too. They share
/// its modules, so each rank makes a model of its own, whole, and keeps what its stages need.
///
/// @param model  modules of one tensor, which return one, as SequentialImpl::forward takes them.
/// @throws InvalidArgument  an empty model; by a stage, a layer that takes or returns something else.
DUALPIPE_DECL std::vector<NamedLayer> layers_of(const torch::nn::Sequential& model);

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

/// Consecutive layers by their names, both of which belong to it.
struct LayerRange {
  std::string first;
  std::string last;
  bool operator==(const LayerRange&) const = default;
};
/// Cuts by hand: stage k takes the layers stages[k], as in {{"embedding", "block2"}, {"block3", "head"}}.
///
/// @throws InvalidArgument  also a name that no layer has, layers that are in no stage, in two, or not in their order:
///                          the text names the first of them.
DUALPIPE_DECL StageFactory split(std::vector<NamedLayer> layers, const std::vector<LayerRange>& stages);
/// Cuts by hand: stage k takes the next counts[k] layers.
///
/// @throws InvalidArgument  also a count below 1, and counts that add up to fewer layers or more than there are.
DUALPIPE_DECL StageFactory split(std::vector<NamedLayer> layers, const std::vector<int>& counts);

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
