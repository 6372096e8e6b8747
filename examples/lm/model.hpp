#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dualpipe/train/partition.hpp"

namespace lm {

struct ModelSize {
  int layers =
      14;  ///< transformer blocks; with the embedding and the head 16 layers, which 8 and 16 stages share evenly
  int width = 64;
  int heads = 4;
  int context = 64;  ///< longest text the model sees at once, in bytes
};

/// @throws dualpipe::InvalidArgument  a size below 1, or a width that the heads do not divide into even parts.
void check(const ModelSize& size);

/// A byte-level transformer, first layer to last: "embedding" takes [batch, length] int64 with length <= context,
/// "block0", "block1", … take and give [batch, length, width], "norm_head" gives the logits of each position's next
/// byte, [batch, length, 256].
///
/// The first weights follow from `seed` and the layer's place alone: however the layers are cut into stages, the model
/// is the same.
std::vector<dualpipe::NamedLayer> layers_of(const ModelSize& size, std::uint64_t seed);

/// What each of these layers costs beside the others, in multiply-adds per byte.
std::vector<double> layer_costs(const ModelSize& size);

std::int64_t parameter_count(const ModelSize& size);

}  // namespace lm
