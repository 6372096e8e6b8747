#include "dualpipe/runtime/executor.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/input_metadata.h>

#include <chrono>
#include <optional>
#include <unordered_map>
#include <utility>

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
  Run(Communicator& communicator, const std::map<int, Stage>& stages, const Plan& plan, const RunInputs& inputs,
      const std::vector<std::shared_ptr<Observer>>& observers)
      : communicator_(communicator),
        stages_(stages),
        plan_(plan),
        inputs_(inputs),
        observers_(observers),
        program_(plan.program.ranks[communicator.rank()]) {}

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
        case Instruction::Do::receive: {
          const std::size_t before = next_;
          issue();
          TORCH_INTERNAL_ASSERT(next_ > before, "the program sends ", instruction.transfer, " before it is computed");
          break;
        }
      }
    }
    return std::move(outputs_);
  }

 private:
  const Stage& stage_of(const Op& op) const { return stages_.at(op.stage); }
  Slot& slot(int stage, int micro_batch) {
    return slots_[static_cast<std::int64_t>(stage) * plan_.schedule.num_micro_batches + micro_batch];
  }
  void forget(const Op& op) {
    slots_.erase(static_cast<std::int64_t>(op.stage) * plan_.schedule.num_micro_batches + op.micro_batch);
  }
  bool last(const Op& op) const { return op.stage == plan_.schedule.num_stages - 1; }

  // --- transfers
  // -------------------------------------------------------------------------------------------------------------

  /// Walks on through the sends and receives that come next, as far as what they send is ready. Called between steps
  /// and, when results are published early, from inside one.
  void issue() {
    for (; next_ < program_.size(); ++next_) {
      const Instruction& instruction = program_[next_];
      if (instruction.what == Instruction::Do::receive) {
        receives_[instruction.transfer] = communicator_.receive(plan_.program.order[instruction.transfer].from);
      } else if (instruction.what == Instruction::Do::send) {
        const Transfer& transfer = plan_.program.order[instruction.transfer];
        const auto ready = ready_.find({transfer.payload, transfer.stage, transfer.micro_batch});
        if (ready == ready_.end()) return;
        sends_[instruction.transfer] = communicator_.send(transfer.to, std::move(ready->second));
        ready_.erase(ready);
      } else {
        return;
      }
    }
  }

  void deliver(int index) {
    const auto pending = receives_.find(index);
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
    const auto pending = sends_.find(index);
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
    if (step.overlapped) {
      forward(step.op);
      backward(*step.overlapped);
    } else if (step.op.pass == Pass::Forward) {
      forward(step.op);
    } else if (step.op.pass == Pass::BackwardWeight) {
      backward_weight(step.op);
    } else {
      backward(step.op);
    }
    if (!observers_.empty()) record({communicator_.rank(), Lane::compute, step, begin, now()});
  }

  void forward(const Op& op) {
    guarded(op, [&] {
      Slot& here = slot(op.stage, op.micro_batch);
      Tensors inputs = op.stage == 0 ? batch_inputs(op) : std::move(here.inputs);
      const StageContext context{op.stage, op.micro_batch, inputs_.step, inputs_.training, batch(op).extras};
      std::function<at::Tensor(const Tensors&)> loss;
      if (last(op) && inputs_.loss)
        loss = [&](const Tensors& outputs) { return inputs_.loss(outputs, batch(op).targets); };
      StageActivation activation = stage_of(op).forward(inputs, context, loss);

      if (last(op)) {
        if (activation.loss.defined()) outputs_.losses[op.micro_batch] = activation.loss;
        if (inputs_.keep_outputs)
          for (const at::Tensor& output : activation.outputs)
            outputs_.outputs[op.micro_batch].push_back(output.defined() ? output.detach() : output);
      }
      Tensors results = std::move(activation.outputs);
      if (inputs_.training) {
        here.differentiable.clear();
        for (const at::Tensor& result : results)
          here.differentiable.push_back(result.defined() && result.requires_grad());
        if (op.stage > 0)
          for (const at::Tensor& input : inputs) {
            const bool differentiable = input.defined() && input.requires_grad();
            here.differentiable_inputs.push_back(differentiable ? std::optional<torch::autograd::InputMetadata>(input)
                                                                : std::nullopt);
          }
        here.activation = std::move(activation);
      } else {
        forget(op);
      }
      inputs.clear();
      if (!last(op)) publish(Payload::activation, op, std::move(results));
    });
  }

  /// B, or I of a micro-batch whose W comes as an op of its own.
  void backward(const Op& op) {
    guarded(op, [&] {
      Slot& here = slot(op.stage, op.micro_batch);
      Tensors gradients = output_gradients(op, here);
      const bool input_only = op.pass == Pass::BackwardInput;
      // Splitting pays only where somebody waits for the input gradient.
      const bool split = input_only || (plan_.publish == Publish::early && op.stage > 0);
      Tensors input_gradients = split ? here.activation.backward_input(gradients) : here.activation.backward(gradients);
      gradients.clear();
      if (op.stage > 0) publish(Payload::gradient, op, travelling(here, std::move(input_gradients)));
      if (input_only) return;
      if (split) here.activation.backward_weight();
      forget(op);
    });
  }

  void backward_weight(const Op& op) {
    guarded(op, [&] {
      slot(op.stage, op.micro_batch).activation.backward_weight();
      forget(op);
    });
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

  template <class Body>
  void guarded(const Op& op, const Body& body) {
    try {
      body();
    } catch (const CommError&) {
      throw;
    } catch (const InvalidArgument& error) {
      std::throw_with_nested(InvalidArgument(explain(op, error.what())));
    } catch (const std::exception& error) {
      std::throw_with_nested(Error(explain(op, message_of(error))));
    } catch (...) {
      std::throw_with_nested(Error(explain(op, "an exception that is no std::exception")));
    }
  }

  std::string explain(const Op& op, const std::string& what) const {
    return detail::str("rank ", communicator_.rank(), ": ", name_of(op.pass), " of stage ", op.stage, ", micro-batch ",
                       op.micro_batch, ": ", what, "\n  ",
                       cells_around(plan_.schedule, communicator_.rank(), cell_, 2));
  }

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
  const Plan& plan_;
  const RunInputs& inputs_;
  const std::vector<std::shared_ptr<Observer>>& observers_;
  const std::vector<Instruction>& program_;

  const Batch no_batch_;
  std::size_t next_ = 0;  // instruction to come
  int cell_ = 0;          // step under way
  std::unordered_map<std::int64_t, Slot> slots_;
  std::map<Key, Tensors> ready_;  // published, not yet issued
  std::unordered_map<int, Pending> sends_, receives_;
  RunOutputs outputs_;
};

}  // namespace

Plan make_plan(Schedule schedule, Publish publish) {
  Plan plan;
  plan.program = lower(schedule, publish);
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
  return Run(*communicator_, stages_, plan, inputs, observers)();
}

}  // namespace dualpipe
