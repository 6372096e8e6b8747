#pragma once

#include <memory>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/stage/collective.hpp"

// Collectives for Stage::communicate over the communicator of a group: ranks that run the same stage and share its
// experts or shards. Split the group from the communicator that the pipelines' communicators are split from too: an
// abort then ends all of them.
//
// A collective moves rows, that is slices along dimension 0, of any number of tensors at once. All ranks of a group
// move the same number of tensors with the same dtypes and other dimensions. A tensor may be undefined if it is so on
// all ranks. Integers travel without a backward. Where no gradient flows in on some rank, its part counts as zeros.
//
// What does not fit ends the step: the rank that finds it throws an Error that says what, all others a CommError.

namespace dualpipe {

/// Sends rows to each rank of the group and receives rows from each. The last tensor moved holds the splits, integers:
///
/// [size]            how many rows of the other tensors go to each rank, in order. Any number may come.
/// [2, size]         the second row says how many rows must come from each rank; another number is an error.
/// [1, size, kinds]  the rows for a rank are of several kinds, one behind the other: those of each of its experts, say.
///                   The same number of kinds on all ranks.
/// [2, size, kinds]  both.
///
/// The result in their place is [2, size] or [2, size, kinds], int64, on the CPU: what came, and what went. So the
/// splits that a dispatch returns are those that the combine takes, and the combine is checked.
///
///     stage.compute("route", …)                          // {x, rows, splits [1, size, experts of a rank]}
///          .communicate("dispatch", all_to_all(group), {1, 2})
///          .compute("experts", …)                        // {x, rows, splits as they came}: cuts rows by splits[0]
///          .communicate("combine", all_to_all(group), {1, 2});
///
/// The host must know the splits to launch the exchange. Those on a device are copied as soon as the node before has
/// returned, and the host waits for that copy alone, when it launches: what was given to the device meanwhile, such as
/// the other micro-batch of a pair, runs on. Nothing else waits for the device. Splits that leave a stage have to be
/// brought to the device, since only tensors of the device travel between stages.
DUALPIPE_DECL std::shared_ptr<Collective> all_to_all(std::shared_ptr<Communicator> group);

/// The rows of all ranks of the group, in rank order. Ranks may have different numbers of rows. The backward sums the
/// gradients of this rank's rows over all ranks, in rank order.
DUALPIPE_DECL std::shared_ptr<Collective> all_gather(std::shared_ptr<Communicator> group);

/// On rank r: the sum over all ranks, in rank order, of their r-th part. Parts are equal, so the group's size must
/// divide the number of rows. The backward gathers the gradients of all parts.
DUALPIPE_DECL std::shared_ptr<Collective> reduce_scatter(std::shared_ptr<Communicator> group);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/group_collectives.ipp"
#endif
