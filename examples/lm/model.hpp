#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layers.hpp"

namespace lm {

/// A byte-level transformer, first layer to last: "embedding" takes [batch, length] int64 with length <= context,
/// "block0", "block1", … take and give [batch, length, width], "norm_head" gives the logits of each position's next
/// byte, [batch, length, 256].
///
/// The first weights follow from `seed` and the layer's place alone: however the layers are cut into stages, the model
/// is the same.
std::vector<dualpipe::NamedLayer> layers_of(const example::ModelSize& size, std::uint64_t seed);

/// What each of these layers costs beside the others, in multiply-adds per byte.
std::vector<double> layer_costs(const example::ModelSize& size);

/// "14 blocks, width 64, …"
std::string description(const example::ModelSize& size);

}  // namespace lm
