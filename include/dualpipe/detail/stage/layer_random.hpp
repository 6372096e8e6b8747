#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/stage/random.hpp"

// Generators of LibTorch, each called under its mutex.
namespace dualpipe::detail {

/// LibTorch's own, of the CPU and, if it is another, of `device`.
DUALPIPE_DECL std::vector<at::Generator> default_generators(at::Device device);
DUALPIPE_DECL void set_seed(const std::vector<at::Generator>& generators, std::uint64_t seed);
DUALPIPE_DECL std::vector<at::Tensor> states_of(const std::vector<at::Generator>& generators);
DUALPIPE_DECL void set_states(const std::vector<at::Generator>& generators, const std::vector<at::Tensor>& states);

/// What the layers of one stage draw for one micro-batch. A layer with collectives is several nodes of the chain, between
/// which nodes of other micro-batches run; it goes on where it was.
class LayerRandom {
 public:
  /// @param key        none: it does nothing.
  /// @param generator  of the stage's context. If it is one of LibTorch's own, or undefined, all of these that the rank
  ///                   uses are seeded, and have the state back between the nodes that they had before.
  DUALPIPE_DECL LayerRandom(const std::optional<RandomKey>& key, const at::Generator& generator);
  bool on() const { return !generators_.empty(); }

  /// A node of the chain runs.
  class Scope {
   public:
    DUALPIPE_DECL explicit Scope(const LayerRandom& random);
    DUALPIPE_DECL ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const LayerRandom& random_;
    std::vector<at::Tensor> before_;
  };

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
