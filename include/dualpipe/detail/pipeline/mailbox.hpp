#pragma once

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/pipeline/store.hpp"
#include "dualpipe/detail/schedule/dependencies.hpp"

namespace dualpipe::detail {

/// What one rank has computed or received and has not used or sent yet. It makes no difference whether producer and
/// consumer are on this rank or on another.
using Mailbox = Store<StageResult, Tensors>;

inline StageResult result_of(const Transfer& transfer) {
  return {transfer.payload, transfer.stage, transfer.micro_batch};
}

}  // namespace dualpipe::detail
