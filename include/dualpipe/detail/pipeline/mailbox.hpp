#pragma once

#include <map>
#include <utility>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/schedule/dependencies.hpp"

namespace dualpipe::detail {

inline StageResult result_of(const Transfer& transfer) {
  return {transfer.payload, transfer.stage, transfer.micro_batch};
}

/// What one rank has computed or received and has not used or sent yet. It makes no difference whether producer and
/// consumer are on this rank or on another.
class Mailbox {
 public:
  void put(const StageResult& result, Tensors tensors) { waiting_[result] = std::move(tensors); }
  bool has(const StageResult& result) const { return waiting_.contains(result); }
  /// It is there.
  Tensors take(const StageResult& result) { return std::move(waiting_.extract(result).mapped()); }

 private:
  std::map<StageResult, Tensors> waiting_;
};

}  // namespace dualpipe::detail
