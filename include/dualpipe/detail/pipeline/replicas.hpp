#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/buffers.hpp"
#include "dualpipe/detail/pipeline/recorder.hpp"
#include "dualpipe/detail/pipeline/ties.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/stage/stage.hpp"
#include "dualpipe/train/mesh.hpp"

namespace dualpipe::detail {

/// Parameters of all stages, each once, in registration order: stages ascending, and within one as named_parameters
/// gives them.
DUALPIPE_DECL Tensors unique_parameters(const std::map<int, Stage>& stages);

/// Keeps the copies of a stage equal: on the ranks of a pipeline that hold it, and on the ranks at these places in all
/// replicas of the pipeline. Of an expert parameter only the ranks that hold the same part of the experts have copies; of
/// what stages tie, the ranks of all these stages.
class Replicas {
 public:
  /// Collective: one sub-communicator for each distinct set of ranks that hold the same.
  ///
  /// @param world      of all replicas, as `shape` numbers them; outlives this.
  /// @param stages     those of this rank.
  /// @param sum_order  the stages that several ranks hold, in the order in which all ranks begin their sums. A parameter
  ///                   that several stages share is summed with the last of them.
  /// @param options    how buffers are combined and gradients added up, and whether each parameter has one owner among the
  ///                   ranks of its set, else every rank is; the same on all ranks.
  /// @throws InvalidArgument  on every rank: a parameter that stages share, or use as a part of one model, which different
  ///                          sets of ranks hold and do not tie; one shared by ranks that are threads of one process; a
  ///                          name that no buffer has, or a buffer that does not add up; where parameters have owners,
  ///                          ranks of a set that have other parameters or have frozen others.
  DUALPIPE_DECL Replicas(Communicator& world, const MeshShape& shape, const Schedule& schedule,
                         const std::map<int, Stage>& stages, const IsExpert& is_expert,
                         const std::vector<int>& sum_order, const DualPipeOptions& options);

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
  /// Where parameters have owners, only these get the sum, with the same bits; on all others `.grad` is undefined at once.
  DUALPIPE_DECL void begin_sum(int stage);
  /// Whether a parameter of this rank is summed before the gradients of `stage` are complete.
  DUALPIPE_DECL bool summed_before(const at::Tensor& parameter, int stage) const;
  /// Sums the gradients of tied parameters as begin_sum() does those of a stage, as the last sums of all ranks: a tie of
  /// the first stage is complete at the end only. Waits for all sums, and records when they were under way.
  DUALPIPE_DECL void finish_sums(Recorder& recorder);
  /// Collective: parameters and buffers of the lowest holder replace the others'.
  DUALPIPE_DECL void broadcast();
  /// Collective: buffers become one as DualPipeOptions::buffers says. The first time that holders have others of those
  /// about which it says nothing, rank 0 warns.
  ///
  /// @param start  of the step.
  DUALPIPE_DECL void combine_buffers(const BufferTransaction& start);
  /// Collective: compares parameters and buffers of the holders bit by bit, but for those that are to be local.
  ///
  /// @return the same on every rank: the first one that differs, and the way out; empty if all are equal.
  DUALPIPE_DECL std::string difference() const;

  /// Collective: the values that owners have replace the others'. Frozen parameters take no part.
  DUALPIPE_DECL void broadcast_owned();
  /// Whether this rank updates the parameter.
  bool owns(const at::Tensor& parameter) const { return !shards_ || owned_.contains(parameter.unsafeGetTensorImpl()); }

  /// Parameters which this rank owns, or, where all ranks do, for which it is the lowest holder; over all ranks of all
  /// replicas every parameter of the model is counted once.
  const Tensors& counted_parameters() const noexcept { return counted_; }
  const Ties& ties() const noexcept { return ties_; }

 private:
  /// A set of ranks that hold the same, with what they hold.
  struct Group {
    int number;  ///< the same on all of them
    std::shared_ptr<Communicator> communicator;
    Tensors parameters = {};
    Tensors buffers = {};
    std::vector<std::optional<BufferReduction>> reductions = {};  ///< of the buffers, where the options say one
    std::unordered_map<at::TensorImpl*, int> owners =
        {};                                ///< of the parameters, as ranks of the communicator; empty: all own them
    std::vector<std::string> names = {};   ///< "parameter 'weight' of stage 2", of the parameters, then of the buffers
    std::map<int, Tensors> of_stage = {};  ///< the parameters that are summed with each stage; not of ties
    int tied_stage = -1;                   ///< of the group of a tie: a stage of it that this rank holds
  };
  /// What the ranks of a group have sent of gradients that this rank owns, all of one dtype.
  struct Shard {
    std::vector<std::size_t> owned;  ///< of the parameters of the sum
    int rank;                        ///< this rank in the group
    Pending parts;
  };
  /// A sum under way.
  struct Sum {
    int stage;
    Tensors parameters;
    at::Tensor present;  ///< int32 [parameters]: on how many ranks each of them has a gradient
    Pending gradients;   ///< empty where parameters have owners
    std::vector<Shard> shards;
    Pending counts;  ///< empty where they travel with the gradients
  };
  /// A tensor that two ranks have with different bits.
  struct Difference {
    int group;
    std::size_t tensor;
    int rank, other;
  };

  /// Collective over the group: begins the sum of these parameters' gradients.
  DUALPIPE_DECL void begin_sum(const Group& group, int stage, const Tensors& parameters);
  /// Collective. @throws InvalidArgument  on every rank: sets whose ranks would choose different owners.
  DUALPIPE_DECL void check_alike() const;
  /// Collective over the group: sends each gradient to its owner, and drops those that others own.
  DUALPIPE_DECL static void send_to_owners(const Group& group, Sum& sum);
  /// Adds up in rank order.
  DUALPIPE_DECL static void add_shard(const Sum& sum, Shard& shard);
  /// Collective. @param digests  of the tensors of each group that this rank belongs to.
  DUALPIPE_DECL std::vector<Difference> differences(const std::map<int, std::vector<std::uint64_t>>& digests) const;
  /// Collective: the same on every rank.
  DUALPIPE_DECL std::string text_of(const std::vector<Difference>& differences) const;
  DUALPIPE_DECL void warn_of_lost_buffers();

  Communicator& world_;
  Ties ties_;
  std::vector<Group> groups_;
  std::vector<int> sum_order_;
  GradientDtype gradients_;
  bool shards_;
  std::vector<Sum> sums_;
  std::unordered_set<at::TensorImpl*> owned_;  // where parameters have owners
  Tensors counted_;
  bool any_copies_ = false;              // some stage has several holders
  bool watches_buffers_ = false;         // some rank has buffers, and none has been lost so far
  std::vector<std::uint32_t> versions_;  // of the buffers of all groups, after they were made equal
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/replicas.ipp"
#endif
