#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/train/mesh.hpp"

namespace dualpipe::detail {

/// What a rank tells all others when a collective call begins, so that all of them throw what one of them finds wrong
/// before anything else is sent.
struct CallStatement {
  static constexpr std::int64_t mark = 0x6475616c70697065;  ///< begins the message, which other tensors do not
  enum class Call : std::int64_t {
    step,
    evaluate,
    predict,
    predict_everywhere,
    broadcast_batch,
    clip_grad_norm,
    optimizer_step,
    broadcast_parameters
  };
  /// A member of Batch on one rank.
  struct Part {
    bool needed = false;       ///< the rank needs it where the call has it at all
    bool passed = false;       ///< the batch has it
    std::uint64_t digest = 0;  ///< of sizes and values; values on a device are compared at the end of the step
  };

  Call call = Call::step;
  std::string finding = {};            ///< why this rank cannot take part; empty: it can
  bool observed = false;               ///< the rank has observers
  bool input_gradients = false;        ///< the rank has inputs whose gradients the step is to give
  std::int64_t step = 0;               ///< number of steps before
  std::int64_t num_micro_batches = 0;  ///< of this rank's batch, 0: it has none
  Part inputs, targets, extras;
  std::vector<double> weights = {};             ///< as in Batch
  std::map<int, std::uint64_t> trainable = {};  ///< by group of holders: which parameters require grad
  std::vector<std::int64_t> sizes = {};         ///< of each micro-batch along batch_dim, -1: unknown; may be empty
};

/// Collective: the statements of all ranks, by rank. One message per rank, a second one only after a finding.
///
/// @throws CommError        naming the call of this rank: another has left, or does something that is no message.
/// @throws InvalidArgument  another rank does something that is no call of a pipeline, as making one.
DUALPIPE_DECL std::vector<CallStatement> exchange_statements(Communicator& communicator, const CallStatement& mine);

/// The error of two ranks, in numbers of the world, that pass different values of a member of the batch; `name` as in
/// "inputs", `step` as in agreement().
DUALPIPE_DECL std::string other_batch(const char* name, int rank, int first, std::int64_t step);

/// What the statements of all ranks say together.
struct CallAgreement {
  bool observed = false;                 ///< some rank has observers
  bool input_gradients = false;          ///< those of some rank are to be given
  std::int64_t num_micro_batches = 0;    ///< 0: no rank has a batch
  std::vector<std::int64_t> sizes = {};  ///< as in CallStatement, of the replica; empty: no rank knows
  /// Of the micro-batches of all replicas, those of replica d from d * num_micro_batches on; empty: no rank has any.
  std::vector<double> weights = {};
};
/// Ranks of one replica pass the same batch, those of different replicas batches of their own with equally many
/// micro-batches.
///
/// @param statements  of all ranks of the mesh.
/// @param replica     whose sizes are asked for.
/// @param step        how many steps were before, -1 where the call does not train.
/// @param numbers     of the ranks, as world_ranks() gives them.
/// @throws InvalidArgument  the findings, or what ranks disagree about; the same text for the same statements.
DUALPIPE_DECL CallAgreement agreement(const std::vector<CallStatement>& statements, const MeshShape& shape, int replica,
                                      std::int64_t step, const std::vector<int>& numbers);

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/call_statement.ipp"
#endif
