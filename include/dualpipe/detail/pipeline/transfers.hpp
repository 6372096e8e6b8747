#pragma once

#include <cstddef>
#include <optional>
#include <unordered_map>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/run_context.hpp"

namespace dualpipe::detail {

/// One rank's sends, receives and sums of gradients, issued in the order of its program, from and to the mailbox.
class Transfers {
 public:
  explicit Transfers(RunContext& context) : context_(context) {}

  /// Issues the sends and receives that come next, as far as what they send is there, up to the next wait, compute,
  /// release or reduce at or behind `next`. A reduce before it is begun. Called between steps and, when results are
  /// published early, from inside one.
  ///
  /// @param next  instruction to come.
  DUALPIPE_DECL void issue(std::size_t next);
  /// Whether this instruction, a send, receive or reduce, was.
  bool issued(std::size_t instruction) const { return instruction < issued_; }

  /// Null where it is not issued; empty where it was delivered.
  const Pending* receive(int index) const { return find(receives_, index); }
  const Pending* send(int index) const { return find(sends_, index); }
  /// Waits for what arrives and puts it into the mailbox. Does nothing where it was delivered before.
  DUALPIPE_DECL void deliver(int index);
  /// Waits until it is sent, and drops its tensors.
  DUALPIPE_DECL void release(int index);

 private:
  struct Issued {
    Pending pending;
    FlightRecorder::Id id = 0;
  };
  using IssuedTransfers = std::unordered_map<int, Issued>;

  static const Pending* find(const IssuedTransfers& transfers, int index) {
    const auto found = transfers.find(index);
    return found == transfers.end() ? nullptr : &found->second.pending;
  }
  DUALPIPE_DECL Issued received(int index);
  DUALPIPE_DECL Issued sent(int index);
  /// What must come, if earlier runs have shown it.
  DUALPIPE_DECL std::optional<Expected> expected(int index);
  DUALPIPE_DECL void remember(int index, const Tensors& came);
  DUALPIPE_DECL void record(Lane lane, int index, const Pending& pending) const;

  RunContext& context_;
  std::size_t issued_ = 0;  // all before it are issued; it lags behind the rank's instruction while a send waits
  IssuedTransfers sends_, receives_;
  Arrivals* arrivals_ = nullptr;  // null before the first receive, and where they are not asked for
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/transfers.ipp"
#endif
