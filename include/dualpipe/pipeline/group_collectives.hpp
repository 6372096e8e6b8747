#pragma once

#include <memory>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/stage/collective.hpp"

// Collectives for Stage::communicate over the communicator of a group: ranks that run the same stage and share its
// experts or shards. A group is usually a split() of the communicator that the pipelines' ones are split from too, so
// that an abort ends all of them.
//
// All of them move rows, that is slices along dimension 0, of any number of tensors at once; all ranks of a group move
// the same number, which agree in dtype and in the other dimensions. A tensor may be undefined if it is so on all
// ranks. Integers move as well, and have no backward. Where no gradient flows in on some rank, its part counts as
// zeros.
//
// What does not fit is InvalidArgument: on the rank that finds it, and by its abort a CommError on all others.

namespace dualpipe {

/// Sends rows to each rank of the group and receives rows from each, as many as the splits say: the last tensor moved.
///
/// Splits are integers. [size]: how many rows of the others go to each rank, in order; how many come is taken as it
/// comes. [2, size]: the second row says how many must come from each rank, and another number is an error. Result in
/// their place is [2, size], int64, on the same device: what came, and what went. So the result of a dispatch is what
/// the combine that brings everything back takes, and the combine is checked.
///
///     stage.compute("route", …)                          // {x, ids, splits}
///          .communicate("dispatch", all_to_all(group), {0, 1, 2})
///          .compute("experts", …)                        // {y, splits as they came}
///          .communicate("combine", all_to_all(group), {0, 1});
///
/// Splits are best kept on the CPU: they are read when the collective is launched.
std::shared_ptr<Collective> all_to_all(std::shared_ptr<Communicator> group);

/// The rows of all ranks of the group, in rank order; ranks may have different numbers of them. The backward is the sum
/// over all ranks, in rank order, of the gradients of this rank's rows.
std::shared_ptr<Collective> all_gather(std::shared_ptr<Communicator> group);

/// The sum over all ranks, in rank order, of their r-th part, on rank r: parts are equal, so the group's size must
/// divide the number of rows. The backward gathers the gradients of all parts.
std::shared_ptr<Collective> reduce_scatter(std::shared_ptr<Communicator> group);

}  // namespace dualpipe
