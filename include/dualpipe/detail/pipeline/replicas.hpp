#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe::detail {

/// Parameters of all stages, each once, in registration order: stages ascending, and within one as named_parameters
/// gives them.
DUALPIPE_DECL Tensors unique_parameters(const std::map<int, Stage>& stages);

/// Keeps the copies of a stage on several ranks equal.
class Replicas {
 public:
  /// Collective: one sub-communicator for each distinct set of ranks that hold the same stages.
  ///
  /// @param communicator  outlives this.
  /// @throws InvalidArgument  on every rank: a parameter shared by stages that different sets of ranks hold, or by ranks
  ///                          that are threads of one process.
  DUALPIPE_DECL Replicas(Communicator& communicator, const Schedule& schedule, const std::map<int, Stage>& stages);

  /// Which parameters require grad, as a hash for each group of holders that this rank belongs to. All holders must
  /// have the same when sum_gradients() is called.
  DUALPIPE_DECL std::map<int, std::uint64_t> trainable() const;
  /// Collective: `.grad` of each parameter that requires grad becomes the sum over the holders, bitwise the same on all
  /// of them. One absent on some holders counts as zeros there; one absent on all stays undefined. Sparse gradients
  /// become dense. Frozen parameters take no part.
  DUALPIPE_DECL void sum_gradients();
  /// Collective: parameters and buffers of the lowest holder replace the others'.
  DUALPIPE_DECL void broadcast();
  /// Collective: floating-point buffers only (running statistics), as DistributedDataParallel does. The first time that
  /// holders have others, rank 0 warns.
  DUALPIPE_DECL void broadcast_buffers();
  /// Collective: compares parameters and buffers of the holders bit by bit.
  ///
  /// @return the same on every rank: the first one that differs, and the way out; empty if all are equal.
  DUALPIPE_DECL std::string difference() const;

  /// Parameters for which this rank is the lowest holder; over all ranks every parameter of the model is counted once.
  const Tensors& counted_parameters() const noexcept { return counted_; }

 private:
  struct Group {
    int number;  ///< the same on all holders
    std::shared_ptr<Communicator> communicator;
    Tensors parameters;
    Tensors buffers;
    std::vector<std::string> names;  ///< "parameter 'weight' of stage 2", of the parameters, then of the buffers
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

  Communicator& communicator_;
  std::vector<Group> groups_;
  Tensors counted_;
  bool any_copies_ = false;              // some stage has several holders
  bool watches_buffers_ = false;         // some rank has buffers, and none has been lost so far
  std::vector<std::uint32_t> versions_;  // of the buffers of all groups, after they were made equal
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/replicas.ipp"
#endif
