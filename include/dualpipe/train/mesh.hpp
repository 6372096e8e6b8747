#pragma once

#include <functional>
#include <memory>
#include <string>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// How the ranks of the world are numbered.
enum class MeshOrder {
  data_fastest,  ///< rank = place * data + replica: the ranks that hold a stage are neighbours, so that what replicas and
                 ///< experts exchange stays within a host, and only boundary transfers cross hosts
  pipeline_fastest,  ///< rank = replica * pipeline + place: the ranks of a pipeline are neighbours
};

/// How many ranks a mesh has along each of its dimensions. Members in the order in which a reader sets them.
///
/// Each replica of the pipeline is a row of `pipeline` ranks, its places. The ranks at one place of all replicas form a
/// data group; `expert` neighbours in it form an expert group, which holds all experts together.
struct MeshShape {
  int pipeline = 1;  ///< ranks of each pipeline
  int data = 1;      ///< replicas of the pipeline, each with a part of the batch of its own
  int expert = 1;    ///< replicas that share one set of experts; divides `data`
  MeshOrder order = MeshOrder::data_fastest;
  bool operator==(const MeshShape&) const = default;

  int size() const noexcept { return pipeline * data; }
  /// Of the world, from the place in the pipeline and the replica.
  int rank_of(int place, int replica) const noexcept {
    return order == MeshOrder::data_fastest ? place * data + replica : replica * pipeline + place;
  }
  int place_of(int rank) const noexcept { return order == MeshOrder::data_fastest ? rank / data : rank % pipeline; }
  int replica_of(int rank) const noexcept { return order == MeshOrder::data_fastest ? rank % data : rank / pipeline; }

  /// @throws InvalidArgument  sizes below 1, expert groups that do not divide data groups, or sizes that do not multiply
  ///                          to `num_ranks`.
  DUALPIPE_DECL void check(int num_ranks) const;
};

/// Tells the parameters and buffers of which each rank of an expert group holds its own, from those that all of them
/// hold alike, by their names in the pipeline ("stage2.block0.experts.3.weight"). Null: all are alike.
using IsExpert = std::function<bool(const std::string& name)>;

/// The ranks of a run, and the communicators of the groups that each of them belongs to. Copies share them.
///
///     Mesh mesh(world, {.pipeline = 4, .data = 2, .expert = 2});   // 8 ranks
///     DualPipe pipe(mesh, options, factory);
///
/// All communicators are made by the constructor, in one order on all ranks, and belong to the family of the world: they
/// fail together. All ranks of a group use its communicator in one order. Where a rank uses several of them, the order
/// over all of these is one as well: two ranks that begin a collective of data() and one of expert() in different orders
/// wait for each other. A pipeline keeps to such an order in its steps.
class Mesh {
 public:
  /// Collective over the world.
  ///
  /// @throws InvalidArgument  on every rank: a shape that does not fit the world, or differs between ranks. The world
  ///                          stays usable.
  DUALPIPE_DECL Mesh(std::shared_ptr<Communicator> world, const MeshShape& shape);

  const MeshShape& shape() const noexcept { return shape_; }
  /// All ranks.
  const std::shared_ptr<Communicator>& world() const noexcept { return world_; }
  /// The ranks of this rank's pipeline, by place. The world itself where there is one pipeline.
  const std::shared_ptr<Communicator>& pipeline() const noexcept { return pipeline_; }
  /// The ranks at this place, by replica: they hold the same stages. Its rank() is the number of this rank's replica.
  const std::shared_ptr<Communicator>& data() const noexcept { return data_; }
  /// Those of data() that share one set of experts: rank k holds the k-th part of them. data() itself where all do.
  const std::shared_ptr<Communicator>& expert() const noexcept { return expert_; }
  /// Those of data() that hold the same part of the experts. data() itself where expert groups have one rank.
  const std::shared_ptr<Communicator>& expert_replicas() const noexcept { return expert_replicas_; }

  int num_replicas() const noexcept { return shape_.data; }
  /// Which replica of the pipeline this rank belongs to.
  int replica() const noexcept { return shape_.replica_of(world_->rank()); }

 private:
  MeshShape shape_;
  std::shared_ptr<Communicator> world_, pipeline_, data_, expert_, expert_replicas_;
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/train/mesh.ipp"
#endif
