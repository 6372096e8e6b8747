#pragma once

#include "dualpipe/stage/partition.hpp"

#include <torch/nn/modules/container/sequential.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "dualpipe/detail/stage/module_parts.hpp"

namespace dualpipe {
namespace detail {

/// Costs of the layers before each layer, and of all. A stage [i, j) costs sum[j] - sum[i].
inline std::vector<double> running_sum(const std::vector<double>& costs) {
  std::vector<double> sum(costs.size() + 1, 0);
  std::partial_sum(costs.begin(), costs.end(), sum.begin() + 1);
  return sum;
}

/// The end of the longest stage from `begin` that costs at most `limit`; `begin` itself where not even one layer
/// fits_stages.
inline int farthest_cut(const std::vector<double>& sum, int begin, double limit) {
  const auto end = std::upper_bound(sum.begin() + begin, sum.end(), limit,
                                    [&](double bound, double until) { return until - sum[begin] > bound; });
  return static_cast<int>(end - sum.begin()) - 1;
}

inline bool fits_stages(const std::vector<double>& sum, int num_stages, double limit) {
  const int num_layers = static_cast<int>(sum.size()) - 1;
  int position = 0;
  for (int stage = 0; stage < num_stages && position < num_layers; ++stage) {
    const int next = farthest_cut(sum, position, limit);
    if (next == position) return false;
    position = next;
  }
  return position == num_layers;
}

/// The smallest number that a costliest stage can have, exactly: bisection until no number lies between.
inline double cheapest_stage_limit(const std::vector<double>& sum, int num_stages) {
  double too_small = 0;
  double enough = sum.back();
  for (;;) {
    const double middle = too_small + (enough - too_small) / 2;
    if (middle <= too_small || middle >= enough) return enough;
    (fits_stages(sum, num_stages, middle) ? enough : too_small) = middle;
  }
}

/// An equal share of the layers from `begin` on for each of `num_stages` stages, where a layer that costs more than a
/// share is a stage of its own and what is left is shared among the others.
inline double fair_share(const std::vector<double>& costs, int begin, int num_stages) {
  double share = std::numeric_limits<double>::infinity();
  for (int sharing = 0;;) {
    double rest = 0;
    int large = 0;
    for (auto cost = costs.begin() + begin; cost != costs.end(); ++cost) {
      if (*cost > share) {
        ++large;
      } else {
        rest += *cost;
      }
    }
    if (num_stages - large == sharing || large >= num_stages) return share;
    sharing = num_stages - large;
    share = rest / sharing;
  }
}

inline void check_layer_costs(const std::vector<double>& costs, int num_stages) {
  DUALPIPE_CHECK(num_stages >= 1, "a model needs at least one stage, got ", num_stages);
  DUALPIPE_CHECK(costs.size() >= static_cast<std::size_t>(num_stages), "each stage needs a layer: got ", costs.size(),
                 " layers for ", num_stages, " stages");
  for (std::size_t i = 0; i < costs.size(); ++i) {
    DUALPIPE_CHECK(std::isfinite(costs[i]) && costs[i] > 0, "the cost of layer ", i,
                   " must be positive and finite, got ", costs[i]);
  }
  const double total = std::accumulate(costs.begin(), costs.end(), 0.0);
  DUALPIPE_CHECK(std::isfinite(total), "the costs of the layers add up to more than a double holds; scale them down");
}

inline void check_layers(const std::vector<NamedLayer>& layers) {
  std::set<std::string_view> names;
  for (const auto& layer : layers) {
    const std::string padded = "." + layer.name + ".";
    DUALPIPE_CHECK(padded.find("..") == std::string::npos,
                   "a layer's name must not be empty, nor any part of it between dots, got '", layer.name, "'");
    DUALPIPE_CHECK(layer.make != nullptr, "layer '", layer.name, "' has no function that makes it");
    DUALPIPE_CHECK(names.insert(layer.name).second, "two layers are named '", layer.name, "'");
  }
  for (const auto name : names) {
    for (auto dot = name.find('.'); dot != std::string_view::npos; dot = name.find('.', dot + 1)) {
      DUALPIPE_CHECK(!names.contains(name.substr(0, dot)), "layer '", name, "' lies inside of layer '",
                     name.substr(0, dot), "': their checkpoint keys could collide");
    }
  }
}

inline Stage made_with_seed(std::uint64_t seed, const std::string& layer, at::Device device,
                            const std::function<Stage()>& make) {
  const SeededDefaults scope(weights_seed(seed, layer), device);
  return make();
}

/// @param cuts  stage s takes layers [cuts[s], cuts[s + 1]).
inline StageFactory cut_layers(std::vector<NamedLayer> layers, std::vector<int> cuts) {
  const int num_stages = static_cast<int>(cuts.size()) - 1;
  return StageFactory(
      [layers = std::move(layers), cuts = std::move(cuts), num_stages](
          int stage, const std::optional<std::uint64_t>& seed, at::Device device) {
        DUALPIPE_CHECK(stage >= 0 && stage < num_stages, "the model is split into stages 0 to ", num_stages - 1,
                       ", got stage ", stage);
        auto module = std::make_shared<ModuleLevel>("Stage");
        Stage result(module);
        for (int i = cuts[stage]; i < cuts[stage + 1]; ++i) {
          Stage layer = seed ? made_with_seed(*seed, layers[i].name, device, layers[i].make) : layers[i].make();
          if (layer.module()) module->insert_module(layers[i].name, layer.module());
          result.append(layers[i].name, layer.layer(layers[i].name));
        }
        return result;
      },
      num_stages);
}

inline int layer_named(const std::vector<NamedLayer>& layers, const std::string& name, std::size_t stage) {
  const auto found = std::find_if(layers.begin(), layers.end(), [&](const auto& layer) { return layer.name == name; });
  DUALPIPE_CHECK(found != layers.end(), "stage ", stage, " takes a layer '", name,
                 "' that the model does not have; its ", layers.size(), " layers begin with '", layers.front().name,
                 "' and end with '", layers.back().name, "'");
  return static_cast<int>(found - layers.begin());
}

}  // namespace detail

std::vector<int> balance(const std::vector<double>& costs, int num_stages) {
  detail::check_layer_costs(costs, num_stages);
  const auto sum = detail::running_sum(costs);
  const double limit = detail::cheapest_stage_limit(sum, num_stages);
  const int num_layers = static_cast<int>(costs.size());

  std::vector<int> stages_needed(costs.size() + 1, 0);  // for the layers from here on
  for (int i = num_layers - 1; i >= 0; --i) stages_needed[i] = 1 + stages_needed[detail::farthest_cut(sum, i, limit)];

  std::vector<int> cuts{0};
  for (int left = num_stages - 1; left >= 0; --left) {  // stages after this one
    const int begin = cuts.back();
    const int last = std::min(detail::farthest_cut(sum, begin, limit), num_layers - left);
    int first = begin + 1;
    while (stages_needed[first] > left) ++first;
    const double share = sum[begin] + detail::fair_share(costs, begin, left + 1);
    int cut = static_cast<int>(std::lower_bound(sum.begin() + first, sum.begin() + last, share) - sum.begin());
    if (cut > first && share - sum[cut - 1] <= sum[cut] - share) --cut;
    cuts.push_back(cut);
  }
  return cuts;
}

std::vector<NamedLayer> layers_of(const torch::nn::Sequential& model) {
  DUALPIPE_CHECK(!model.is_empty() && !model->is_empty(), "the model has no layers");
  std::vector<NamedLayer> layers;
  for (const auto& child : model->named_children()) {
    torch::nn::AnyModule module = *(model->begin() + static_cast<std::ptrdiff_t>(layers.size()));
    layers.push_back({child.key(), [module = std::move(module)] {
                        Stage stage(module.ptr());
                        return stage.takes(1).compute(
                            "forward", Compute([module](const Tensors& inputs, const StageContext&) mutable {
                              return Tensors{module.forward(inputs.at(0))};
                            }));
                      }});
  }
  return layers;
}

StageFactory split(std::vector<NamedLayer> layers, int num_stages, std::vector<double> costs) {
  detail::check_layers(layers);
  if (costs.empty()) costs.assign(layers.size(), 1.0);
  DUALPIPE_CHECK(costs.size() == layers.size(), "one cost per layer: got ", costs.size(), " costs for ", layers.size(),
                 " layers");
  std::vector<int> cuts = balance(costs, num_stages);
  return detail::cut_layers(std::move(layers), std::move(cuts));
}

StageFactory split(std::vector<NamedLayer> layers, const std::vector<LayerRange>& stages) {
  detail::check_layers(layers);
  DUALPIPE_CHECK(!stages.empty() && !layers.empty(), "a model needs at least one stage and one layer, got ",
                 stages.size(), " stages and ", layers.size(), " layers");
  std::vector<int> cuts;
  std::vector<int> stage_of(layers.size(), -1);
  for (std::size_t stage = 0; stage < stages.size(); ++stage) {
    const auto& [first, last] = stages[stage];
    const int begin = detail::layer_named(layers, first, stage);
    const int end = detail::layer_named(layers, last, stage) + 1;
    DUALPIPE_CHECK(begin < end, "stage ", stage, " goes from layer '", first, "' to '", last,
                   "', which comes before it");
    for (int i = begin; i < end; ++i) {
      DUALPIPE_CHECK(stage_of[i] < 0, "layer '", layers[i].name, "' is in stage ", stage_of[i], " and in stage ", stage,
                     "; each belongs to one");
      stage_of[i] = static_cast<int>(stage);
    }
    cuts.push_back(begin);
  }
  for (std::size_t i = 0; i < layers.size(); ++i)
    DUALPIPE_CHECK(stage_of[i] >= 0, "layer '", layers[i].name, "' is in none of the ", stages.size(), " stages");
  for (std::size_t stage = 1; stage < stages.size(); ++stage)
    DUALPIPE_CHECK(cuts[stage - 1] < cuts[stage], "stage ", stage, " begins with layer '", stages[stage].first,
                   "', which comes before those of stage ", stage - 1, "; stages take layers in the model's order");
  cuts.push_back(static_cast<int>(layers.size()));
  return detail::cut_layers(std::move(layers), std::move(cuts));
}

StageFactory split(std::vector<NamedLayer> layers, const std::vector<int>& counts) {
  detail::check_layers(layers);
  DUALPIPE_CHECK(!counts.empty(), "a model needs at least one stage, got no counts of layers");
  std::vector<int> cuts{0};
  for (const int count : counts) {
    const int stage = static_cast<int>(cuts.size()) - 1;
    const int left = static_cast<int>(layers.size()) - cuts.back();
    DUALPIPE_CHECK(count >= 1, "stage ", stage, " takes ", count, " layers; each takes one at least");
    DUALPIPE_CHECK(count <= left, "stage ", stage, " takes ", count, " layers, of which only ", left, " are left",
                   left > 0 ? detail::str(", from '", layers[cuts.back()].name, "' on") : "");
    cuts.push_back(cuts.back() + count);
  }
  DUALPIPE_CHECK(cuts.back() == static_cast<int>(layers.size()), "layer '", layers[cuts.back()].name,
                 "' is in no stage: the ", counts.size(), " stages take ", cuts.back(), " of ", layers.size(),
                 " layers");
  return detail::cut_layers(std::move(layers), std::move(cuts));
}

}  // namespace dualpipe
