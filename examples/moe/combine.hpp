#pragma once

#include <memory>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/stage/collective.hpp"

namespace moe {

/// Brings rows back to the ranks they came from and adds them to the bytes they belong to: what a library of
/// collectives for experts offers as one call. A stage's result is then one tensor per byte, not one per byte and
/// expert, and that is all that crosses to the next rank.
///
/// Moves {x [batch, length, width], rows [rows, width], token [rows as they left], splits as the dispatch gave them}.
/// Gives x with the rows added in the place of x, and nothing in the others'.
std::shared_ptr<dualpipe::Collective> combine(std::shared_ptr<dualpipe::Communicator> group);

}  // namespace moe
