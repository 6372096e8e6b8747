#pragma once

#include <cstddef>
#include <deque>
#include <optional>
#include <string>

#include "dualpipe/detail/pipeline/context.hpp"
#include "dualpipe/detail/pipeline/micro_batches.hpp"

namespace dualpipe {

/// What a step needs of the run around it.
class StepHost {
 public:
  virtual ~StepHost() = default;
  /// A result of `op` is there.
  virtual void publish(Payload payload, const Op& op, Tensors tensors) = 0;
  /// The host is about to wait.
  virtual void before_blocking() = 0;
  /// Behind each piece.
  virtual void between() = 0;
  /// Only weight parts are left of the step under way.
  virtual void only_weights_left() = 0;

  bool explained = false;  ///< the exception under way says where it happened
};

/// One step of a schedule under way on one rank: its passes, and where they are.
class RunningStep final : public PairListener {
 public:
  /// @param cell  number of the step on its rank.
  RunningStep(const RunContext& context, MicroBatches& micro_batches, StepHost& host, const Step& step, int cell);

  /// Runs all pieces. False: a collective that ends a chain is still under way. What is thrown says where.
  bool run();
  /// Goes on with such a collective; true once none is left.
  bool settle(bool block);

  /// The op whose backward begins by launching a collective, if there is one.
  const Op* launches_first();
  /// Before the step's turn, when what its backward takes is there: goes as far as launching the collective with which
  /// it begins.
  void launch_ahead();

  bool involves(const Step& step) const;

 private:
  void turn(const Piece& piece) override { turn_ = piece; }
  void begins(const Piece& piece) override;
  void computed(const Piece& piece) override;
  void launched(const Piece& piece) override;
  void collected(Side side, const Pending& pending) override;
  void blocks(const Pending& pending) override;
  void between() override { host_.between(); }
  void forward_over() override;
  void backward_over() override;

  ForwardPass* forward() { return forward_ ? &*forward_ : nullptr; }
  BackwardPass* backward() { return backward_ ? &*backward_ : nullptr; }
  const Op& op(Side side) const { return side == Side::forward ? *forward_op_ : *backward_op_; }
  const PairOrders::Entry& order();
  void start_backward();
  void weight_part();
  void remaining_weights();
  void forget_if_over();
  /// What a piece is in a trace.
  Op recorded(const Piece& piece) const;

  template <class Body>
  bool guarded(const Body& body);
  [[noreturn]] void rethrow_explained() const;
  std::string explain(const std::string& what) const;

  const RunContext& context_;
  MicroBatches& micro_batches_;
  StepHost& host_;
  int cell_;
  std::optional<Op> forward_op_, backward_op_;
  std::optional<ForwardPass> forward_;
  std::optional<BackwardPass> backward_;
  Piece turn_;
  Mark begin_;             // of the piece that computes
  Recorder::Range range_;  // the same for a profiler
  const PairOrders::Entry* order_ = nullptr;
  std::size_t next_ = 0;     // of the pieces
  std::deque<int> weights_;  // nodes whose weight parts may run, where they have no places in the order
  bool backward_over_ = false;
  bool weights_over_ = false;
};

}  // namespace dualpipe
