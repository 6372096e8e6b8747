#include "dualpipe/detail/pipeline/step.hpp"

#include <exception>
#include <span>
#include <utility>

#include "dualpipe/detail/pipeline/agree.hpp"
#include "dualpipe/detail/schedule/pass_name.hpp"

namespace dualpipe {

RunningStep::RunningStep(const RunContext& context, MicroBatches& micro_batches, StepHost& host, const Step& step,
                         int cell)
    : context_(context), micro_batches_(micro_batches), host_(host), cell_(cell) {
  if (step.op.pass == Pass::Forward) forward_op_ = step.op;
  if (step.overlapped) backward_op_ = step.overlapped;
  if (step.op.pass != Pass::Forward) backward_op_ = step.op;
}

bool RunningStep::run() {
  return guarded([&] {
    if (backward_op_ && backward_op_->pass == Pass::BackwardWeight) {
      const StageActivation& activation = micro_batches_.activation(*backward_op_);
      for (int node = static_cast<int>(activation.nodes.size()); node-- > 0;)
        if (activation.has_weight_part(node)) weights_.push_back(node);
      remaining_weights();
      micro_batches_.forget(*backward_op_);
      return true;
    }
    if (forward_op_) {
      turn({PairSide::forward, -1});
      micro_batches_.start_forward(*forward_op_, forward_);
    }
    start_backward();
    run_pair(std::span(order().pieces).subspan(next_), forward(), backward(), *this);
    remaining_weights();
    weights_over_ = true;
    forget_if_over();
    return settle_last(forward(), backward(), *this, /*block=*/!context_.early());
  });
}

bool RunningStep::settle(bool block) {
  return guarded([&] { return settle_last(forward(), backward(), *this, block); });
}

const Op* RunningStep::launches_first() {
  const bool has_input_part = backward_op_ && backward_op_->pass != Pass::BackwardWeight;
  return has_input_part && order().launch_ahead > 0 ? &*backward_op_ : nullptr;
}

void RunningStep::launch_ahead() {
  guarded([&] {
    start_backward();
    next_ = order().launch_ahead;
    run_pair(std::span(order().pieces).first(next_), nullptr, backward(), *this);
    return true;
  });
}

bool RunningStep::involves(const Step& step) const {
  for (const auto& op : {forward_op_, backward_op_}) {
    if (op && op->micro_batch == step.op.micro_batch) return true;
    if (op && step.overlapped && op->micro_batch == step.overlapped->micro_batch) return true;
  }
  return false;
}

const PairOrders::Entry& RunningStep::order() {
  if (order_ == nullptr) {
    const auto side = [&](const std::optional<Op>& op) { return op ? &context_.stage_of(*op) : nullptr; };
    const auto ends_in_loss = [&](const std::optional<Op>& op) {
      return op && context_.last(*op) && context_.inputs.loss != nullptr;
    };
    const bool weights = backward_op_ && backward_op_->pass == Pass::Backward && !context_.fills_waits;
    order_ = &context_.orders.find(side(forward_op_), ends_in_loss(forward_op_), side(backward_op_),
                                   ends_in_loss(backward_op_), weights);
  }
  return *order_;
}

void RunningStep::start_backward() {
  if (!backward_op_ || backward_) return;
  turn({PairSide::backward, -1});
  micro_batches_.start_backward(*backward_op_, backward_, order().communicates);
}

void RunningStep::weight_part() {
  const PairOp piece{PairSide::weight, weights_.front()};
  turn(piece);
  begins(piece);
  StageActivation& activation = micro_batches_.activation(*backward_op_);
  bool more = false;
  if (context_.fills_waits)
    more = activation.backward_weight_part(piece.node);
  else
    activation.backward_weight(piece.node);
  computed(piece);
  if (!more) weights_.pop_front();
  host_.between();
}

/// One after the other, as launches of others allow.
void RunningStep::remaining_weights() {
  while (!weights_.empty()) {
    settle_last(forward(), backward(), *this, /*block=*/false);
    turn({PairSide::weight, weights_.front()});
    host_.only_weights_left();
    weight_part();
  }
}

/// A B that has run both parts.
void RunningStep::forget_if_over() {
  if (weights_over_ && backward_over_ && backward_op_->pass == Pass::Backward) micro_batches_.forget(*backward_op_);
}

// --- what the pair tells

/// Weight parts fill the wait.
void RunningStep::blocks(const Pending& pending) {
  const PairOp waiting = turn_;
  while (!weights_.empty() && !pending.done()) weight_part();
  turn(waiting);
  if (!pending.done()) host_.before_blocking();
}

void RunningStep::begins(const PairOp& piece) {
  if (!order().communicates) return;  // the step as a whole is recorded
  begin_ = context_.recorder.mark();
  range_ = context_.recorder.range([&] {
    const Op op = recorded(piece);
    return to_string(op) + ' ' + context_.stage_of(op).chain_name(piece.node);
  });
}

void RunningStep::launched(const PairOp&) { range_.reset(); }

void RunningStep::computed(const PairOp& piece) {
  if (context_.fills_waits && piece.side == PairSide::backward && backward_op_->pass == Pass::Backward &&
      backward_->activation().has_weight_part(piece.node))
    weights_.push_back(piece.node);
  if (!order().communicates) return;
  range_.reset();
  if (!context_.recorder.on()) return;
  const Op op = recorded(piece);
  context_.recorder.record(Lane::node, {op, {}}, begin_, context_.recorder.mark(),
                           context_.stage_of(op).chain_name(piece.node));
}

void RunningStep::collected(PairSide side, const Pending& pending) {
  if (!context_.recorder.on()) return;
  const int node = side == PairSide::forward ? forward_->node() : backward_->node();
  context_.recorder.record(Lane::collective, {op(side), {}}, pending, context_.stage_of(op(side)).chain_name(node));
}

Op RunningStep::recorded(const PairOp& piece) const {
  Op op = this->op(piece.side);
  if (piece.side == PairSide::weight) op.pass = Pass::BackwardWeight;
  if (piece.side == PairSide::backward && op.pass == Pass::Backward &&
      backward_->activation().has_weight_part(piece.node))
    op.pass = Pass::BackwardInput;
  return op;
}

void RunningStep::forward_over() {
  Tensors results = micro_batches_.end_forward(*forward_op_, *forward_);
  if (!context_.last(*forward_op_)) host_.publish(Payload::activation, *forward_op_, std::move(results));
}

void RunningStep::backward_over() {
  Tensors gradients = micro_batches_.end_backward(*backward_op_, *backward_);
  if (backward_op_->stage > 0) host_.publish(Payload::gradient, *backward_op_, std::move(gradients));
  backward_over_ = true;
  forget_if_over();
}

// --- what is thrown

/// Says where it happened, of what `body` throws; once, also where one step finishes the collective of another.
template <class Body>
bool RunningStep::guarded(const Body& body) {
  try {
    return body();
  } catch (...) {
    if (std::exchange(host_.explained, true)) throw;
    rethrow_explained();
  }
}

void RunningStep::rethrow_explained() const {
  try {
    throw;
  } catch (const CommError& error) {
    if (order_ == nullptr || !order_->communicates) throw;  // a transfer, which names itself
    std::throw_with_nested(CommError(error.origin_rank(), error.operation(), explain(error.what())));
  } catch (const InvalidArgument& error) {
    std::throw_with_nested(InvalidArgument(explain(error.what())));
  } catch (const std::exception& error) {
    std::throw_with_nested(Error(explain(message_of(error))));
  } catch (...) {
    std::throw_with_nested(Error(explain("an exception that is no std::exception")));
  }
}

std::string RunningStep::explain(const std::string& what) const {
  const Op& op = this->op(turn_.side);
  const Pass pass = turn_.side == PairSide::weight ? Pass::BackwardWeight : op.pass;
  const Stage& stage = context_.stage_of(op);
  std::string node;
  if (turn_.side == PairSide::forward) {
    if (forward_) node = forward_->at();
  } else if (turn_.side == PairSide::backward) {
    if (backward_) node = stage.chain_name(backward_->node());
  } else {
    node = stage.chain_name(turn_.node);
  }
  node = !node.empty() && stage.node_names().size() > 1 ? ", node " + node : "";
  const int rank = context_.communicator.rank();
  return detail::str("rank ", rank, ": ", detail::pass_name(pass), " of stage ", op.stage, node, ", micro-batch ",
                     op.micro_batch, ": ", what, "\n  ", cells_around(context_.plan.schedule, rank, cell_, 2));
}

}  // namespace dualpipe
