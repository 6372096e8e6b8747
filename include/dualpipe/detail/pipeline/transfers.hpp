#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "dualpipe/detail/pipeline/context.hpp"

namespace dualpipe {

/// One rank's sends and receives, issued in the order of its program.
class Transfers {
 public:
  explicit Transfers(const RunContext& context)
      : context_(context), program_(context.plan.program.ranks[context.communicator.rank()]) {}

  const Transfer& operator[](int index) const { return context_.plan.program.order[index]; }

  /// Keeps a result for the send that takes it.
  void publish(Payload payload, const Op& op, Tensors tensors) {
    ready_[{payload, op.stage, op.micro_batch}] = std::move(tensors);
  }
  /// Issues the sends and receives that come next, as far as what they send is there, up to the next wait, compute or
  /// release at or behind `next`. Called between steps and, when results are published early, from inside one.
  ///
  /// @param next  instruction that the rank is at.
  void issue(std::size_t next);
  /// Whether this instruction, a send or receive, was.
  bool issued(std::size_t instruction) const { return instruction < issued_; }

  /// The transfer's receive; null if it is not issued.
  const Pending* receive(int index) const { return find(receives_, index); }
  const Pending* send(int index) const { return find(sends_, index); }
  /// Waits for what arrives.
  Tensors take(int index);
  /// Waits until it is sent, and drops its tensors.
  void release(int index);

 private:
  struct Key {
    Payload payload;
    int stage;
    int micro_batch;
    auto operator<=>(const Key&) const = default;
  };
  using Pendings = std::unordered_map<int, Pending>;

  static const Pending* find(const Pendings& pendings, int index) {
    const auto found = pendings.find(index);
    return found == pendings.end() ? nullptr : &found->second;
  }
  /// What must come, if earlier runs have taught it.
  std::optional<Expected> expected(int index);
  void learn(int index, const Tensors& came);
  void record(Lane lane, int index, const Pending& pending) const;

  const RunContext& context_;
  const std::vector<Instruction>& program_;
  std::size_t issued_ = 0;  // sends and receives before it are; behind the rank while one waits for its tensors
  std::map<Key, Tensors> ready_;
  Pendings sends_, receives_;
  Arrivals* arrivals_ = nullptr;  // null before the first receive, and where they are not asked for
};

}  // namespace dualpipe
