#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string_view>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/stage/generators.hpp"

namespace dualpipe {

/// What a pipeline seeds the random numbers of a layer by, beside the name of the layer.
struct RandomKey {
  std::uint64_t seed = 0;        ///< of the run: DualPipeOptions::seed
  std::int64_t step = 0;         ///< number of training steps before, as StageContext::step
  std::int64_t micro_batch = 0;  ///< counted over all replicas: replica * micro-batches + StageContext::micro_batch
  std::int64_t call = 0;         ///< 0: the step; n: the n-th call of evaluate() or predict() since the step before
  bool operator==(const RandomKey&) const = default;
};

/// The seed of what a layer draws for one micro-batch. Neither the schedule, the cut nor the number of ranks has a part
/// in it, and it is the same in all programs. Generators of the CPU use its lower 32 bits.
///
/// @param layer  its name in the model (NamedLayer::name); of a stage that was not made by split(), "stage<k>"; of the
///               loss function, "".
DUALPIPE_DECL std::uint64_t layer_seed(const RandomKey& key, std::string_view layer);
/// The seed that a layer, or a stage that was not made by split(), is made with: of its first weights.
DUALPIPE_DECL std::uint64_t weights_seed(std::uint64_t seed, std::string_view layer);

/// While it lives, LibTorch's default generators of the CPU and of one device go on from a seed; then they have the
/// state back that they had before. So one process that trains alone draws what the layers of a pipeline draw:
///
///     SeededDefaults scope(layer_seed({.seed = 1, .step = step, .micro_batch = m}, "block0"));
///     x = block0->forward(x);
///
/// Threads share these generators: one at a time has such an object, and nobody else draws meanwhile.
class SeededDefaults {
 public:
  DUALPIPE_DECL explicit SeededDefaults(std::uint64_t seed, at::Device device = at::kCPU);

 private:
  detail::KeptStates kept_;
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/stage/random.ipp"
#endif
