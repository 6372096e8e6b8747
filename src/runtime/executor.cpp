#include "dualpipe/runtime/executor.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/input_metadata.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <unordered_map>
#include <utility>

#include "dualpipe/runtime/pair.hpp"
#include "runtime/agree.hpp"

namespace dualpipe {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

const char* name_of(Pass pass) {
  switch (pass) {
    case Pass::Forward:
      return "forward";
    case Pass::BackwardInput:
      return "input backward";
    case Pass::BackwardWeight:
      return "weight backward";
    case Pass::Backward:
      return "backward";
  }
  return "?";
}

/// One micro-batch on one stage, from the arrival of its inputs to the end of its backward.
struct Slot {
  Tensors inputs;     // waiting for F
  Tensors gradients;  // waiting for B or I; one per output that requires grad
  StageActivation activation;
  std::vector<bool> differentiable;  // outputs that require grad
  std::vector<std::optional<torch::autograd::InputMetadata>> differentiable_inputs;
};

/// One run of one rank's program.
class Run {
 public:
  Run(Communicator& communicator, const std::map<int, Stage>& stages, PairOrders& orders, const Plan& plan,
      const RunInputs& inputs, const std::vector<std::shared_ptr<Observer>>& observers)
      : communicator_(communicator),
        stages_(stages),
        orders_(orders),
        plan_(plan),
        inputs_(inputs),
        observers_(observers),
        program_(plan.program.ranks[communicator.rank()]),
        communicates_(std::any_of(stages.begin(), stages.end(), [](const auto& entry) {
          return entry.second.structure().find('X') != std::string::npos;
        })) {}

  RunOutputs operator()() {
    while (next_ < program_.size()) {
      const Instruction& instruction = program_[next_];
      switch (instruction.what) {
        case Instruction::Do::compute:
          ++next_;
          compute(instruction.step);
          ++cell_;
          break;
        case Instruction::Do::wait:
          ++next_;
          deliver(instruction.transfer);
          break;
        case Instruction::Do::release:
          ++next_;
          release(instruction.transfer);
          break;
        case Instruction::Do::send:
        case Instruction::Do::receive:
          issue();
          TORCH_INTERNAL_ASSERT(issued_ > next_ || trailing_, "the program sends ", instruction.transfer,
                                " before it is computed");
          ++next_;
          break;
      }
    }
    finish_trailing();
    return std::move(outputs_);
  }

 private:
  /// A step under way: its passes, and where they are.
  class Running final : public PairListener {
   public:
    Running(Run& run, const Step& step, int cell) : run_(run), cell_(cell) {
      if (step.op.pass == Pass::Forward) forward_op_ = step.op;
      if (step.overlapped) backward_op_ = step.overlapped;
      if (step.op.pass != Pass::Forward) backward_op_ = step.op;
    }

    /// Runs all pieces. False: a collective that ends a chain is still under way.
    bool operator()() {
      return guarded([&] {
        if (backward_op_ && backward_op_->pass == Pass::BackwardWeight) {
          weight();
          return true;
        }
        if (forward_op_) {
          turn({Side::forward, -1});
          run_.start_forward(*forward_op_, forward_);
        }
        start_backward();
        const std::span<const Piece> pieces = order().pieces;
        run_pair(pieces.subspan(next_, order().last_weights - next_), forward(), backward(), *this);
        for (next_ = order().last_weights; next_ < pieces.size(); ++next_) {
          run_.launch_ahead(weight_seconds_);
          run_pair(pieces.subspan(next_, 1), forward(), backward(), *this);
        }
        weights_over_ = true;
        if (backward_op_ && backward_over_) leave_backward();
        return settle_last(forward(), backward(), *this, /*block=*/run_.plan_.publish == Publish::atomic);
      });
    }
    /// Before the step's turn, when the gradient that its backward takes has come: launches the collective with which
    /// it begins, and nothing else.
    void launch_ahead() {
      guarded([&] {
        start_backward();
        run_pair(std::span(order().pieces).first(1), nullptr, backward(), *this);
        next_ = 1;
        return true;
      });
    }
    /// Whether there is one.
    bool can_launch_ahead() {
      return backward_op_ && backward_op_->pass != Pass::BackwardWeight && order().backward_first;
    }
    const std::optional<Op>& backward_op() const { return backward_op_; }
    /// Goes on with such a collective; true once none is left.
    bool settle(bool block) {
      return guarded([&] { return settle_last(forward(), backward(), *this, block); });
    }
    bool involves(int micro_batch) const {
      return (forward_op_ && forward_op_->micro_batch == micro_batch) ||
             (backward_op_ && backward_op_->micro_batch == micro_batch);
    }

   private:
    ForwardPass* forward() { return forward_ ? &*forward_ : nullptr; }
    BackwardPass* backward() { return backward_ ? &*backward_ : nullptr; }
    const Op& op(Side side) const { return side == Side::forward ? *forward_op_ : *backward_op_; }

    const PairOrders::Entry& order() {
      if (order_ == nullptr) order_ = &run_.order_of(forward_op_, backward_op_);
      return *order_;
    }
    void start_backward() {
      if (!backward_op_ || backward_) return;
      turn({Side::backward, -1});
      run_.start_backward(*backward_op_, backward_, order().communicates);
    }

    void weight() {
      StageActivation& activation = run_.slot(*backward_op_).activation;
      for (int node = static_cast<int>(activation.nodes.size()); node-- > 0;) {
        turn({Side::weight, node});
        activation.backward_weight(node);
      }
      run_.forget(*backward_op_);
    }
    void leave_backward() {
      if (backward_op_->pass == Pass::Backward) run_.forget(*backward_op_);
    }

    void turn(const Piece& piece) override { turn_ = piece; }
    void computed(const Piece& piece, const Span& span) override {
      if (piece.side == Side::weight) weight_seconds_ = span.end - span.begin;
      if (!order().communicates || run_.observers_.empty()) return;
      Op op = this->op(piece.side);
      if (piece.side == Side::weight) op.pass = Pass::BackwardWeight;
      if (piece.side == Side::backward && op.pass == Pass::Backward && !backward_->activation().nodes[piece.node].whole)
        op.pass = Pass::BackwardInput;
      record(Lane::node, op, piece.node, span);
    }
    void collected(Side side, const Span& span) override {
      if (span.end > span.begin)
        record(Lane::collective, op(side), side == Side::forward ? forward_->node() : backward_->node(), span);
    }
    void blocks() override { run_.before_blocking(); }
    void between() override { run_.settle_trailing(); }
    void forward_over() override { run_.end_forward(*forward_op_, *forward_); }
    void backward_over() override {
      run_.end_backward(*backward_op_, *backward_);
      backward_over_ = true;
      if (weights_over_) leave_backward();
    }

    void record(Lane lane, const Op& op, int node, const Span& span) {
      if (run_.observers_.empty()) return;
      run_.record(
          {run_.communicator_.rank(), lane, {op, {}}, span.begin, span.end, run_.stage_of(op).chain_name(node)});
    }

    /// Says where it happened, of what `body` throws; once, also where one step finishes the collective of another.
    template <class Body>
    bool guarded(const Body& body) {
      try {
        return body();
      } catch (...) {
        if (std::exchange(run_.explained_, true)) throw;
        rethrow_explained();
      }
    }

    [[noreturn]] void rethrow_explained() const {
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

    std::string explain(const std::string& what) const {
      const Op& op = this->op(turn_.side);
      const Pass pass = turn_.side == Side::weight ? Pass::BackwardWeight : op.pass;
      const Stage& stage = run_.stage_of(op);
      std::string node;
      if (turn_.side == Side::forward) {
        if (forward_) node = forward_->at();
      } else if (turn_.side == Side::backward) {
        if (backward_) node = stage.chain_name(backward_->node());
      } else {
        node = stage.chain_name(turn_.node);
      }
      node = !node.empty() && stage.node_names().size() > 1 ? ", node " + node : "";
      const int rank = run_.communicator_.rank();
      return detail::str("rank ", rank, ": ", name_of(pass), " of stage ", op.stage, node, ", micro-batch ",
                         op.micro_batch, ": ", what, "\n  ", cells_around(run_.plan_.schedule, rank, cell_, 2));
    }

    Run& run_;
    int cell_;
    std::optional<Op> forward_op_, backward_op_;
    std::optional<ForwardPass> forward_;
    std::optional<BackwardPass> backward_;
    Piece turn_;
    const PairOrders::Entry* order_ = nullptr;
    std::size_t next_ = 0;       // of the pieces; 1 when the first was launched ahead
    double weight_seconds_ = 0;  // how long the last weight part took
    bool backward_over_ = false;
    bool weights_over_ = false;
  };

  const Stage& stage_of(const Op& op) const { return stages_.at(op.stage); }
  std::int64_t place(int stage, int micro_batch) const {
    return static_cast<std::int64_t>(stage) * plan_.schedule.num_micro_batches + micro_batch;
  }
  Slot& slot(int stage, int micro_batch) { return slots_[place(stage, micro_batch)]; }
  Slot& slot(const Op& op) { return slot(op.stage, op.micro_batch); }
  void forget(const Op& op) { slots_.erase(place(op.stage, op.micro_batch)); }
  bool last(const Op& op) const { return op.stage == plan_.schedule.num_stages - 1; }

  // --- transfers
  // -------------------------------------------------------------------------------------------------------------

  /// Issues the sends and receives that come next, as far as what they send is ready, up to the next wait, compute or
  /// release that has not been executed. Called between steps and, when results are published early, from inside one.
  void issue() {
    for (; issued_ < program_.size(); ++issued_) {
      const Instruction& instruction = program_[issued_];
      if (instruction.what == Instruction::Do::receive) {
        receives_[instruction.transfer] = communicator_.receive(plan_.program.order[instruction.transfer].from);
      } else if (instruction.what == Instruction::Do::send) {
        const Transfer& transfer = plan_.program.order[instruction.transfer];
        const auto ready = ready_.find({transfer.payload, transfer.stage, transfer.micro_batch});
        if (ready == ready_.end()) return;
        sends_[instruction.transfer] = communicator_.send(transfer.to, std::move(ready->second));
        ready_.erase(ready);
      } else if (issued_ >= next_) {
        return;
      }
    }
  }

  void deliver(int index) {
    if (delivered_ahead_ == index) {
      delivered_ahead_ = -1;
      return;
    }
    auto pending = receives_.find(index);
    if (trailing_ && (pending == receives_.end() || !pending->second.done())) {
      finish_trailing();
      pending = receives_.find(index);
    }
    Tensors tensors = pending->second.take();
    record(Lane::receive, index, pending->second.span());
    receives_.erase(pending);
    const Transfer& transfer = plan_.program.order[index];
    if (transfer.payload == Payload::activation)
      slot(transfer.stage + 1, transfer.micro_batch).inputs = std::move(tensors);
    else
      slot(transfer.stage - 1, transfer.micro_batch).gradients = std::move(tensors);
  }

  void release(int index) {
    auto pending = sends_.find(index);
    if (trailing_ && (pending == sends_.end() || !pending->second.done())) {
      finish_trailing();
      pending = sends_.find(index);
    }
    pending->second.wait();
    record(Lane::send, index, pending->second.span());
    sends_.erase(pending);
  }

  /// Hands a result on: to the stage's neighbour on this rank, or to the send that waits for it.
  void publish(Payload payload, const Op& op, Tensors tensors) {
    const int neighbour = payload == Payload::activation ? op.stage + 1 : op.stage - 1;
    if (plan_.rank_of(neighbour, op.micro_batch) == communicator_.rank()) {
      Slot& next = slot(neighbour, op.micro_batch);
      (payload == Payload::activation ? next.inputs : next.gradients) = std::move(tensors);
      return;
    }
    ready_[{payload, op.stage, op.micro_batch}] = std::move(tensors);
    if (plan_.publish == Publish::early) issue();
  }

  // --- compute
  // ---------------------------------------------------------------------------------------------------------------

  void compute(const Step& step) {
    const double begin = observers_.empty() ? 0 : now();
    // What a chain's last collective will give may be what this step takes.
    if (trailing_ && (trailing_->involves(step.op.micro_batch) ||
                      (step.overlapped && trailing_->involves(step.overlapped->micro_batch))))
      finish_trailing();
    auto running = ahead_ ? std::move(ahead_) : std::make_unique<Running>(*this, step, cell_);
    const bool over = (*running)();
    if (!observers_.empty()) record({communicator_.rank(), Lane::compute, step, begin, now()});
    if (over) return;
    finish_trailing();
    trailing_ = std::move(running);
  }

  // A collective that ends a chain runs on under the next step. Nothing can come to wait for it by a detour: a rank
  // that is about to wait for anything finishes it first, and issues the sends that wait for it. Its peers launch it in
  // the same step, and before whatever they launch later.

  void settle_trailing() {
    if (trailing_ && trailing_->settle(/*block=*/false)) trailing_.reset();
  }
  void finish_trailing() {
    if (const auto trailing = std::move(trailing_)) trailing->settle(/*block=*/true);
  }
  void before_blocking() {
    finish_trailing();
    if (plan_.publish == Publish::early) issue();
  }

  /// Called where a step has only weight parts left: they can hide the collective with which the backward of the next
  /// step begins, if its gradient is here, or comes while one weight part has hardly begun. When that is depends on
  /// timing; the order of collectives does not, as only weight parts lie between.
  ///
  /// @param weight_seconds  how long a weight part takes, as far as known.
  void launch_ahead(double weight_seconds) {
    if (!communicates_ || ahead_ || plan_.publish == Publish::atomic) return;
    std::size_t at = next_;
    while (at < program_.size() && program_[at].what != Instruction::Do::compute) ++at;
    if (at == program_.size()) return;
    auto running = std::make_unique<Running>(*this, program_[at].step, cell_ + 1);
    if (!running->can_launch_ahead()) return;
    for (std::size_t i = next_; i < at; ++i) {
      if (program_[i].what != Instruction::Do::wait) continue;
      const Transfer& transfer = plan_.program.order[program_[i].transfer];
      if (transfer.payload != Payload::gradient || transfer.stage != running->backward_op()->stage + 1 ||
          transfer.micro_batch != running->backward_op()->micro_batch)
        continue;
      const auto pending = receives_.find(program_[i].transfer);
      if (pending == receives_.end() || !arrives(pending->second, weight_seconds / 10)) return;
      deliver(program_[i].transfer);
      delivered_ahead_ = program_[i].transfer;
      running->launch_ahead();
      ahead_ = std::move(running);
      return;
    }
  }

  static bool arrives(const Pending& pending, double seconds) {
    if (pending.done()) return true;
    for (const double deadline = now() + seconds; now() < deadline;) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      if (pending.done()) return true;
    }
    return false;
  }

  const PairOrders::Entry& order_of(const std::optional<Op>& forward, const std::optional<Op>& backward) {
    const bool weights = backward && backward->pass == Pass::Backward;
    return orders_.find(forward ? &stage_of(*forward) : nullptr, forward && last(*forward) && inputs_.loss,
                        backward ? &stage_of(*backward) : nullptr, backward && last(*backward) && inputs_.loss,
                        weights);
  }

  void start_forward(const Op& op, std::optional<ForwardPass>& pass) {
    Slot& here = slot(op);
    Tensors inputs = op.stage == 0 ? batch_inputs(op) : std::move(here.inputs);
    if (inputs_.training && op.stage > 0)
      for (const at::Tensor& input : inputs) {
        const bool differentiable = input.defined() && input.requires_grad();
        here.differentiable_inputs.push_back(differentiable ? std::optional<torch::autograd::InputMetadata>(input)
                                                            : std::nullopt);
      }
    const StageContext context{op.stage, op.micro_batch, inputs_.step, inputs_.training, batch(op).extras};
    StageLoss loss;
    if (last(op) && inputs_.loss)
      loss = [this, op](const Tensors& outputs) { return inputs_.loss(outputs, batch(op).targets); };
    pass.emplace(stage_of(op), std::move(inputs), context, std::move(loss));
  }

  void end_forward(const Op& op, ForwardPass& pass) {
    StageActivation activation = pass.take();
    if (last(op)) {
      if (activation.loss.defined()) outputs_.losses[op.micro_batch] = activation.loss;
      if (inputs_.keep_outputs)
        for (const at::Tensor& output : activation.outputs)
          outputs_.outputs[op.micro_batch].push_back(output.defined() ? output.detach() : output);
    }
    Tensors results = std::move(activation.outputs);
    if (inputs_.training) {
      Slot& here = slot(op);
      here.differentiable.clear();
      for (const at::Tensor& result : results)
        here.differentiable.push_back(result.defined() && result.requires_grad());
      here.activation = std::move(activation);
    } else {
      forget(op);
    }
    if (!last(op)) publish(Payload::activation, op, std::move(results));
  }

  /// B, or I of a micro-batch whose W comes as an op of its own.
  void start_backward(const Op& op, std::optional<BackwardPass>& pass, bool communicates) {
    Slot& here = slot(op);
    // Splitting pays only where somebody waits for the input gradient, or a collective for a pause of the host.
    const bool whole =
        op.pass == Pass::Backward && !communicates && (plan_.publish == Publish::atomic || op.stage == 0);
    pass.emplace(here.activation, output_gradients(op, here), whole);
  }

  void end_backward(const Op& op, BackwardPass& pass) {
    Tensors input_gradients = pass.take();
    if (op.stage > 0) publish(Payload::gradient, op, travelling(slot(op), std::move(input_gradients)));
  }

  /// One gradient per thing that the stage's graph ends in: the loss, or each output.
  Tensors output_gradients(const Op& op, Slot& here) const {
    if (last(op)) {
      if (here.activation.loss.defined()) return {at::full_like(here.activation.loss, inputs_.loss_scale)};
      return Tensors(here.differentiable.size());
    }
    Tensors gradients;
    std::size_t next = 0;
    for (const bool differentiable : here.differentiable) {
      DUALPIPE_CHECK(!differentiable || next < here.gradients.size(), "stage ", op.stage + 1, " returned ",
                     here.gradients.size(), " gradients for the outputs of stage ", op.stage, ", which has more");
      gradients.push_back(differentiable ? std::move(here.gradients[next++]) : at::Tensor());
    }
    here.gradients.clear();
    return gradients;
  }

  /// The gradients that travel: one per input that requires grad; where nothing flowed, zeros.
  static Tensors travelling(const Slot& here, Tensors input_gradients) {
    Tensors gradients;
    for (std::size_t i = 0; i < here.differentiable_inputs.size(); ++i) {
      if (!here.differentiable_inputs[i]) continue;
      at::Tensor gradient = std::move(input_gradients[i]);
      gradients.push_back(gradient.defined() ? gradient : here.differentiable_inputs[i]->zeros_like());
    }
    return gradients;
  }

  const Batch& batch(const Op& op) const {
    return inputs_.micro_batches.empty() ? no_batch_ : inputs_.micro_batches[op.micro_batch];
  }

  /// Copies, so that in-place code at the start of the first stage does not write into the caller's batch.
  Tensors batch_inputs(const Op& op) const {
    Tensors inputs;
    for (const at::Tensor& input : batch(op).inputs)
      inputs.push_back(input.detach().to(communicator_.device(), input.scalar_type(), false, true));
    return inputs;
  }

  // --- bookkeeping
  // -----------------------------------------------------------------------------------------------------------

  void record(Lane lane, int index, const Span& span) {
    if (observers_.empty()) return;
    const Transfer& transfer = plan_.program.order[index];
    const Pass producer = transfer.payload == Payload::activation ? Pass::Forward : Pass::BackwardInput;
    record({communicator_.rank(), lane, {{producer, transfer.stage, transfer.micro_batch}, {}}, span.begin, span.end});
  }
  void record(const Interval& interval) {
    for (const auto& observer : observers_) observer->record(interval);
  }

  struct Key {
    Payload payload;
    int stage;
    int micro_batch;
    auto operator<=>(const Key&) const = default;
  };

  Communicator& communicator_;
  const std::map<int, Stage>& stages_;
  PairOrders& orders_;
  const Plan& plan_;
  const RunInputs& inputs_;
  const std::vector<std::shared_ptr<Observer>>& observers_;
  const std::vector<Instruction>& program_;
  const bool communicates_;  // some stage of this rank does

  const Batch no_batch_;
  std::size_t next_ = 0;    // instruction to come
  std::size_t issued_ = 0;  // of the sends and receives, those before it are issued; behind next_ while one waits for
                            // the end of a collective
  int cell_ = 0;            // step under way
  std::unordered_map<std::int64_t, Slot> slots_;
  std::map<Key, Tensors> ready_;  // published, not yet issued
  std::unordered_map<int, Pending> sends_, receives_;
  std::unique_ptr<Running> trailing_;  // the step whose last collective is still under way
  std::unique_ptr<Running> ahead_;     // the next step, if its first collective is launched
  int delivered_ahead_ = -1;           // the transfer that it took
  bool explained_ = false;             // the exception under way says where it happened
  RunOutputs outputs_;
};

}  // namespace

Plan make_plan(Schedule schedule, Publish publish, bool communicates) {
  Plan plan;
  plan.program = lower(schedule, publish, communicates ? PairReady{.activation = 1, .gradient = 0.75} : PairReady{});
  dry_run(plan.program);
  plan.publish = publish;
  plan.placement = placement(schedule);
  plan.schedule = std::move(schedule);
  return plan;
}

Executor::Executor(std::shared_ptr<Communicator> communicator, std::map<int, Stage> stages)
    : communicator_(std::move(communicator)), stages_(std::move(stages)) {}

RunOutputs Executor::run(const Plan& plan, const RunInputs& inputs,
                         const std::vector<std::shared_ptr<Observer>>& observers) {
  return Run(*communicator_, stages_, orders_, plan, inputs, observers)();
}

}  // namespace dualpipe
