#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/stage/stage.hpp"
#include "dualpipe/train/mesh.hpp"

namespace dualpipe::detail {

/// A tensor of the model that several stages have, as Stage::tie() says.
struct Tie {
  /// Its name in one of the stages.
  struct Place {
    int stage = 0;
    std::string name;
    auto operator<=>(const Place&) const = default;
  };
  std::vector<Place> places;  ///< ascending
  std::vector<int> ranks;     ///< of all replicas, that hold one of the stages; ascending
  bool is_parameter = true;
  at::Tensor tensor;  ///< of this rank; undefined where it holds none of the stages
};

/// All of them, in one order on every rank.
class Ties {
 public:
  Ties() = default;
  /// Collective.
  ///
  /// @param stages  those of this rank.
  /// @throws InvalidArgument  on every rank, as Stage::tie() says.
  DUALPIPE_DECL Ties(Communicator& world, const MeshShape& shape, const Schedule& schedule,
                     const std::map<int, Stage>& stages, const IsExpert& is_expert);

  const std::vector<Tie>& all() const noexcept { return ties_; }
  /// Null: nobody ties it.
  const Tie* find(int stage, const std::string& name) const {
    const auto found = by_place_.find({stage, name});
    return found == by_place_.end() ? nullptr : &ties_[found->second];
  }

 private:
  std::vector<Tie> ties_;
  std::map<Tie::Place, std::size_t> by_place_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/ties.ipp"
#endif
