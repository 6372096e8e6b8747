#include "dualpipe/detail/pipeline/executor.hpp"

#include <algorithm>
#include <memory>
#include <utility>

#include "dualpipe/detail/pipeline/context.hpp"
#include "dualpipe/detail/pipeline/micro_batches.hpp"
#include "dualpipe/detail/pipeline/step.hpp"
#include "dualpipe/detail/pipeline/transfers.hpp"

namespace dualpipe {
namespace {

/// One run of one rank's program.
class Run final : public StepHost {
 public:
  explicit Run(const RunContext& context)
      : context_(context),
        program_(context.plan.program.ranks[context.communicator.rank()]),
        micro_batches_(context),
        transfers_(context) {}

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
          wait(instruction.transfer);
          break;
        case Instruction::Do::release:
          ++next_;
          release(instruction.transfer);
          break;
        case Instruction::Do::send:
        case Instruction::Do::receive:
          transfers_.issue(next_);
          TORCH_INTERNAL_ASSERT(transfers_.issued(next_) || trailing_, "the program sends ", instruction.transfer,
                                " before it is computed");
          ++next_;
          break;
      }
    }
    finish_trailing();
    return std::move(micro_batches_.outputs());
  }

 private:
  void compute(const Step& step) {
    const auto range = context_.recorder.range([&] { return to_string(step); });
    const Mark begin = context_.recorder.mark();
    // What a chain's last collective will give may be what this step takes.
    if (trailing_ && trailing_->involves(step)) finish_trailing();
    auto running = ahead_ ? std::move(ahead_) : make(step, cell_);
    const bool over = running->run();
    context_.recorder.record(Lane::compute, step, begin, context_.recorder.mark());
    if (over) return;
    finish_trailing();
    trailing_ = std::move(running);
  }

  std::unique_ptr<RunningStep> make(const Step& step, int cell) {
    return std::make_unique<RunningStep>(context_, micro_batches_, *this, step, cell);
  }

  void wait(int index) {
    if (delivered_ahead_ == index) {
      delivered_ahead_ = -1;
      return;
    }
    before_waiting_for(transfers_.receive(index));
    deliver(index);
  }
  void release(int index) {
    before_waiting_for(transfers_.send(index));
    transfers_.release(index);
  }
  void deliver(int index) {
    const Transfer& transfer = transfers_[index];
    const int to = transfer.payload == Payload::activation ? transfer.stage + 1 : transfer.stage - 1;
    micro_batches_.put(transfer.payload, to, transfer.micro_batch, transfers_.take(index));
  }

  /// Hands a result on: to the stage's neighbour on this rank, or to the send that waits for it.
  void publish(Payload payload, const Op& op, Tensors tensors) override {
    const int neighbour = payload == Payload::activation ? op.stage + 1 : op.stage - 1;
    if (context_.plan.rank_of(neighbour, op.micro_batch) == context_.communicator.rank()) {
      micro_batches_.put(payload, neighbour, op.micro_batch, std::move(tensors));
      return;
    }
    transfers_.publish(payload, op, std::move(tensors));
    if (context_.early()) transfers_.issue(next_);
  }

  // A collective that ends a chain runs on under the next step. Nothing can come to wait for it by a detour: a rank
  // that is about to wait for anything finishes it first, and issues the sends that wait for it. Its peers launch it in
  // the same step, and before whatever they launch later.

  void between() override {
    if (trailing_ && trailing_->settle(/*block=*/false)) trailing_.reset();
  }
  void finish_trailing() {
    if (const auto trailing = std::move(trailing_)) trailing->settle(/*block=*/true);
  }
  /// A transfer that is not even issued waits for a result that such a collective brings.
  void before_waiting_for(const Pending* transfer) {
    if (trailing_ && (transfer == nullptr || !transfer->done())) finish_trailing();
  }
  void before_blocking() override {
    finish_trailing();
    if (context_.early()) transfers_.issue(next_);
  }

  /// The next step, if its backward begins by launching a collective.
  struct Candidate {
    std::size_t at = 0;                 // what comes next when this was looked up
    std::unique_ptr<RunningStep> step;  // null: there is no such step
    int gradient = -1;                  // transfer that its backward takes, -1: none
  };

  /// Weight parts can hide the collective with which the backward of the next step begins, once what it takes is here.
  /// When that is depends on timing; the order of collectives does not, as only weight parts lie between.
  void only_weights_left() override {
    if (!context_.fills_waits || ahead_ || !context_.early()) return;
    if (candidate_.at != next_) candidate_ = next_backward();
    if (candidate_.step == nullptr) return;
    const Op& backward = *candidate_.step->launches_first();
    if (context_.last(backward)) {
      if (!micro_batches_.is_forward_over(backward)) return;
    } else {
      const Pending* const transfer = candidate_.gradient < 0 ? nullptr : transfers_.receive(candidate_.gradient);
      if (transfer == nullptr || !transfer->done()) return;
      explained = true;  // a transfer that failed names itself
      deliver(candidate_.gradient);
      explained = false;
      delivered_ahead_ = candidate_.gradient;
    }
    candidate_.step->launch_ahead();
    ahead_ = std::move(candidate_.step);
  }

  Candidate next_backward() {
    std::size_t at = next_;
    while (at < program_.size() && program_[at].what != Instruction::Do::compute) ++at;
    if (at == program_.size()) return {next_, nullptr};
    Candidate candidate{next_, make(program_[at].step, cell_ + 1)};
    const Op* const backward = candidate.step->launches_first();
    if (backward == nullptr) return {next_, nullptr};
    for (std::size_t i = next_; i < at; ++i) {
      if (program_[i].what != Instruction::Do::wait) continue;
      const Transfer& transfer = transfers_[program_[i].transfer];
      if (transfer.payload == Payload::gradient && transfer.stage == backward->stage + 1 &&
          transfer.micro_batch == backward->micro_batch)
        candidate.gradient = program_[i].transfer;
    }
    return candidate;
  }

  const RunContext& context_;
  const std::vector<Instruction>& program_;
  MicroBatches micro_batches_;
  Transfers transfers_;
  std::size_t next_ = 0;                   // instruction to come
  int cell_ = 0;                           // step under way
  std::unique_ptr<RunningStep> trailing_;  // the step whose last collective is still under way
  std::unique_ptr<RunningStep> ahead_;     // the next step, if its first collective is launched
  Candidate candidate_;
  int delivered_ahead_ = -1;  // the transfer that ahead_ took
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
    : communicator_(std::move(communicator)), stages_(std::move(stages)) {
  const bool host_waits = communicator_->device().is_cpu() && communicator_->device_trace() == nullptr;
  fills_waits_ = host_waits && std::any_of(stages_.begin(), stages_.end(),
                                           [](const auto& entry) { return entry.second.communicates(); });
}

RunOutputs Executor::run(const Plan& plan, const RunInputs& inputs,
                         const std::vector<std::shared_ptr<Observer>>& observers) {
  const auto recorder = std::make_shared<Recorder>(*communicator_, observers);
  const RunContext context{*communicator_, stages_, orders_, plan, inputs, *recorder, fills_waits_};
  RunOutputs outputs = Run(context)();
  outputs.recorder = recorder;
  return outputs;
}

}  // namespace dualpipe
