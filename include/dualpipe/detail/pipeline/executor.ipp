#pragma once

#include "dualpipe/detail/pipeline/executor.hpp"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>

#include "dualpipe/detail/pipeline/digest.hpp"
#include "dualpipe/detail/pipeline/overlap.hpp"
#include "dualpipe/detail/pipeline/run_context.hpp"
#include "dualpipe/detail/pipeline/step_run.hpp"
#include "dualpipe/detail/pipeline/transfers.hpp"

namespace dualpipe::detail {

/// Interprets one rank's program.
class ProgramRun {
 public:
  explicit ProgramRun(RunContext& context) : context_(context), transfers_(context), overlap_(context, transfers_) {}

  void operator()() {
    const std::vector<Instruction>& program = context_.program();
    while (next_ < program.size()) {
      const auto& [what, transfer, step] = program[next_++];
      switch (what) {
        case Instruction::Do::compute:
          compute(step);
          ++context_.cell;
          break;
        case Instruction::Do::wait:
          before_waiting_for(transfers_.receive(transfer));
          transfers_.deliver(transfer);
          break;
        case Instruction::Do::release:
          before_waiting_for(transfers_.send(transfer));
          transfers_.release(transfer);
          break;
        case Instruction::Do::reduce:
          // Nothing that comes before it in the order may wait for a trailing collective any longer.
          transfers_.issue(next_);
          if (!transfers_.issued(next_ - 1)) finish_trailing();
          transfers_.issue(next_);
          TORCH_INTERNAL_ASSERT(transfers_.issued(next_ - 1), "the program begins sum ", transfer, " too early");
          break;
        case Instruction::Do::send:
        case Instruction::Do::receive:
          transfers_.issue(next_);
          TORCH_INTERNAL_ASSERT(transfers_.issued(next_ - 1) || overlap_.trails(), "the program sends ", transfer,
                                " before it is computed");
          break;
      }
    }
    finish_trailing();
  }

 private:
  void compute(const Step& step) {
    const auto range = context_.recorder.range([&] { return to_string(step); });
    const FlightRecorder::Id id = context_.flight.start({.step = step});
    const Mark begin = context_.recorder.mark();
    if (overlap_.trailing_feeds(step)) finish_trailing();
    std::unique_ptr<StepRun> running = overlap_.take_ahead();
    if (running == nullptr) running = std::make_unique<StepRun>(context_, step, context_.cell);
    const bool trails = run(*running) == StepRun::Event::trails;
    running->record_step(step, begin);
    context_.flight.end(id);
    if (!trails) return;
    finish_trailing();
    overlap_.trail(std::move(running));
  }

  /// The step runs until it is over or, where results leave early, until it only trails.
  StepRun::Event run(StepRun& step) {
    for (;;) {
      const StepRun::Event event = step.next();
      switch (event) {
        case StepRun::Event::ran:
          break;
        case StepRun::Event::half_over:
          issue_inside_step();
          break;
        case StepRun::Event::must_wait:
          if (step.run_weight_part()) break;
          finish_trailing();
          issue_inside_step();  // also the receives behind this step, before the host blocks
          step.wait();
          break;
        case StepRun::Event::weights_left:
          overlap_.launch_ahead(next_, context_.cell);
          step.run_weight_part();
          break;
        case StepRun::Event::trails:
          if (context_.publishes_early()) return event;
          step.wait();
          break;
        case StepRun::Event::over:
          return event;
      }
      poll_trailing();
    }
  }

  void issue_inside_step() {
    if (context_.publishes_early()) transfers_.issue(next_);
  }
  void poll_trailing() {
    if (overlap_.poll()) issue_inside_step();
  }
  void finish_trailing() {
    for (poll_trailing(); overlap_.trails(); poll_trailing()) overlap_.wait();
  }
  /// A transfer that is not issued waits for the result of a trailing collective; an empty one was delivered ahead.
  void before_waiting_for(const Pending* transfer) {
    if (overlap_.trails() && (transfer == nullptr || (*transfer && !transfer->done()))) finish_trailing();
  }

  RunContext& context_;
  Transfers transfers_;
  Overlap overlap_;
  std::size_t next_ = 0;  // instruction to come
};

Plan make_plan(Schedule schedule, Publish publish, const PairReady& ready, int num_replicas, const Schedule* held_as) {
  Plan plan;
  plan.program = lower(schedule, publish, ready, num_replicas, held_as);
  dry_run(plan.program);
  plan.publish = publish;
  plan.placement = placement(schedule);
  std::set<Communicator::Edge> edges;
  for (const Transfer& transfer : plan.program.order) edges.insert({transfer.from, transfer.to});
  plan.edges.assign(edges.begin(), edges.end());
  Digest digest;
  digest.add(to_csv(schedule));
  plan.checksum = digest.value();
  plan.schedule = std::move(schedule);
  return plan;
}

Executor::Executor(std::shared_ptr<Communicator> communicator, std::map<int, Stage> stages, FlightRecorder& flight)
    : communicator_(std::move(communicator)), stages_(std::move(stages)), flight_(flight) {
  const bool host_waits = communicator_->device().is_cpu() && communicator_->device_trace() == nullptr;
  fills_waits_ = host_waits && std::any_of(stages_.begin(), stages_.end(),
                                           [](const auto& entry) { return entry.second.communicates(); });
}

RunOutputs Executor::run(const Plan& plan, const RunInputs& inputs,
                         const std::vector<std::shared_ptr<Observer>>& observers) {
  const auto recorder = std::make_shared<Recorder>(*communicator_, observers);
  RunContext context{*communicator_, stages_, orders_, plan, inputs, *recorder, flight_, fills_waits_};
  ProgramRun run(context);
  run();
  context.outputs.recorder = recorder;
  return std::move(context.outputs);
}

}  // namespace dualpipe::detail
