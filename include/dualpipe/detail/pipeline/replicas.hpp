#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/recorder.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/stage/stage.hpp"
#include "dualpipe/train/mesh.hpp"

namespace dualpipe::detail {

/// Parameters of all stages, each once, in registration order: stages ascending, and within one as named_parameters
/// gives them.
DUALPIPE_DECL Tensors unique_parameters(const std::map<int, Stage>& stages);

/// Keeps the copies of a stage equal: on the ranks of a pipeline that hold it, and on the ranks at these places in all
/// replicas of the pipeline. Of an expert parameter only the ranks that hold the same part of the experts have copies.
class Replicas {
 public:
  /// Collective: one sub-communicator for each distinct set of ranks that hold the same.
  ///
  /// @param world      of all replicas, as `shape` numbers them; outlives this.
  /// @param stages     those of this rank.
  /// @param sum_order  the stages that several ranks hold, in the order in which all ranks begin their sums. A parameter
  ///                   that several stages share is summed with the last of them.
  /// @throws InvalidArgument  on every rank: a parameter shared by stages that different sets of ranks hold, or by ranks
  ///                          that are threads of one process.
  DUALPIPE_DECL Replicas(Communicator& world, const MeshShape& shape, const Schedule& schedule,
                         const std::map<int, Stage>& stages, const IsExpert& is_expert,
                         const std::vector<int>& sum_order);

  /// The steps that come have this order, of the same stages.
  ///
  /// @param stages  as in the constructor.
  DUALPIPE_DECL void set_sum_order(const std::map<int, Stage>& stages, std::vector<int> sum_order);

  /// Which parameters require grad, as a hash for each set of ranks that this rank belongs to. All ranks of a set must
  /// have the same when begin_sum() is called.
  DUALPIPE_DECL std::map<int, std::uint64_t> trainable() const;
  /// Collective over the ranks that hold the stage: `.grad` of each of its parameters that requires grad becomes the sum
  /// over them, by the time finish_sums() returns. It is bitwise the same on all of them. One absent on some ranks counts
  /// as zeros there; one absent on all stays undefined. Sparse gradients become dense. Frozen parameters take no part.
  DUALPIPE_DECL void begin_sum(int stage);
  /// Whether a parameter of this rank is summed before the gradients of `stage` are complete.
  DUALPIPE_DECL bool summed_before(const at::Tensor& parameter, int stage) const;
  /// Waits for all sums that were begun, and records when they were under way.
  DUALPIPE_DECL void finish_sums(Recorder& recorder);
  /// Collective: parameters and buffers of the lowest holder replace the others'.
  DUALPIPE_DECL void broadcast();
  /// Collective: floating-point buffers only (running statistics), as DistributedDataParallel does. The first time that
  /// holders have others, rank 0 warns.
  DUALPIPE_DECL void broadcast_buffers();
  /// Collective: compares parameters and buffers of the holders bit by bit.
  ///
  /// @return the same on every rank: the first one that differs, and the way out; empty if all are equal.
  DUALPIPE_DECL std::string difference() const;

  /// Parameters for which this rank is the lowest holder; over all ranks of all replicas every parameter of the model is
  /// counted once.
  const Tensors& counted_parameters() const noexcept { return counted_; }

 private:
  /// A set of ranks that hold the same, with what they hold.
  struct Group {
    int number;  ///< the same on all of them
    std::shared_ptr<Communicator> communicator;
    Tensors parameters;
    Tensors buffers;
    std::vector<std::string> names;   ///< "parameter 'weight' of stage 2", of the parameters, then of the buffers
    std::map<int, Tensors> of_stage;  ///< the parameters that are summed with each stage
  };
  /// A sum under way.
  struct Sum {
    int stage;
    Tensors parameters;
    at::Tensor present;  ///< int32 [parameters]: on how many ranks each of them has a gradient
    Pending gradients;
    Pending counts;  ///< empty where they travel with the gradients
  };
  /// A tensor that two ranks have with different bits.
  struct Difference {
    int group;
    std::size_t tensor;
    int rank, other;
  };

  /// Collective. @param digests  of the tensors of each group that this rank belongs to.
  DUALPIPE_DECL std::vector<Difference> differences(const std::map<int, std::vector<std::uint64_t>>& digests) const;
  /// Collective: the same on every rank.
  DUALPIPE_DECL std::string text_of(const std::vector<Difference>& differences) const;
  DUALPIPE_DECL void warn_of_lost_buffers();

  Communicator& world_;
  std::vector<Group> groups_;
  std::vector<int> sum_order_;
  std::vector<Sum> sums_;
  Tensors counted_;
  bool any_copies_ = false;              // some stage has several holders
  bool watches_buffers_ = false;         // some rank has buffers, and none has been lost so far
  std::vector<std::uint32_t> versions_;  // of the buffers of all groups, after they were made equal
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/replicas.ipp"
#endif
