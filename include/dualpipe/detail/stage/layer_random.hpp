#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/stage/generators.hpp"
#include "dualpipe/stage/random.hpp"

namespace dualpipe::detail {

/// What the layers of one stage draw for one micro-batch. A layer with collectives is several nodes of the chain, between
/// which nodes of other micro-batches run; it goes on where it was.
class LayerRandom {
 public:
  /// @param key        none: it does nothing.
  /// @param generator  of the stage's context. If it is one of LibTorch's own, or undefined, all of these that the rank
  ///                   uses are seeded, and have the state back between the nodes that they had before.
  DUALPIPE_DECL LayerRandom(const std::optional<RandomKey>& key, const at::Generator& generator);
  bool on() const { return !generators_.empty(); }

  /// For as long as a node of the chain runs.
  KeptStates kept_states() const { return KeptStates(restores_ ? generators_ : std::vector<at::Generator>()); }

  // Called while a node of the chain runs.
  DUALPIPE_DECL void begin(const std::string& layer);
  /// The layer will go on in a later node.
  DUALPIPE_DECL void pause(const std::string& layer);
  DUALPIPE_DECL void go_on(const std::string& layer);

 private:
  RandomKey key_;
  std::vector<at::Generator> generators_;
  bool restores_ = false;
  std::map<std::string, std::vector<at::Tensor>> paused_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/stage/random.ipp"
#endif
