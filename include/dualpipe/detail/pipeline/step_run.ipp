#pragma once

#include "dualpipe/detail/pipeline/step_run.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <exception>
#include <utility>
#include <vector>

#include "dualpipe/detail/error_text.hpp"
#include "dualpipe/detail/pipeline/replicas.hpp"
#include "dualpipe/detail/schedule/pass_name.hpp"

namespace dualpipe::detail {

/// The same memory with version counters of its own: ranks that are threads may see the same batch.
inline Tensors viewed(const Tensors& tensors) {
  Tensors views;
  for (const at::Tensor& tensor : tensors)
    views.push_back(tensor.defined() && !tensor.is_inference() ? tensor.variable_data() : tensor);
  return views;
}

/// For a GPU: a copy from other memory of the host can wait for everything that the device was given before.
inline at::Tensor page_locked(const at::Tensor& input, at::Device device) {
  return device.is_cuda() && input.is_cpu() ? input.contiguous().pin_memory() : input;
}

/// Runs the loss function, and adds its metrics to those of the run. A loss that is trained must have a graph: without one
/// the step would train nothing.
inline at::Tensor loss_with_metrics(RunContext& context, int micro_batch, const Tensors& outputs,
                                    const Tensors& targets) {
  const Tensors values = context.inputs.loss.values(outputs, targets);
  DUALPIPE_CHECK(!values.empty() && values.size() <= LossFn::max_metrics + 1, "the loss function returned ",
                 values.size(), " tensors; it returns the loss and at most ", LossFn::max_metrics, " metrics");
  DUALPIPE_CHECK(
      !context.inputs.training || context.inputs.scale_of(micro_batch) == 0 || !values[0].defined() ||
          values[0].requires_grad(),
      "the loss has no graph, so nothing would be trained: it does not depend on a parameter that requires grad, or it "
      "was computed from detach(), item() or integers; to compute a loss alone call evaluate()");
  Tensors& sums = context.outputs.metrics;
  const bool first = sums.empty() && context.outputs.losses.empty();
  if (first) sums.resize(values.size() - 1);
  DUALPIPE_CHECK(values.size() == sums.size() + 1, "the loss function returned ", values.size() - 1,
                 " metrics, but for the micro-batch before ", sums.size());
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const at::Tensor& metric = values[i + 1];
    DUALPIPE_CHECK(metric.defined() && metric.numel() == 1 && !metric.is_complex(), "metric ", i,
                   " of the loss function must be one real element, is ", to_string(signature_of({metric})),
                   "; sum it over the samples");
    const at::Tensor value = metric.detach().reshape({}).to(context.communicator.device(), at::kDouble);
    sums[i] = first ? value : sums[i] + value;
  }
  return values[0];
}

StepRun::StepRun(RunContext& context, const Step& step, int cell) : context_(context), cell_(cell) {
  if (step.op.pass == Pass::Forward) forward_op_ = step.op;
  if (step.overlapped) backward_op_ = step.overlapped;
  if (step.op.pass != Pass::Forward) backward_op_ = step.op;
  const auto half = [&](const std::optional<Op>& op) -> PairOrders::Half {
    if (!op) return {};
    return {&context.stage_of(*op), context.last(*op) && context.inputs.loss != nullptr};
  };
  const PairOrders::Half forward = half(forward_op_), backward = half(backward_op_);
  communicates_ = (forward.stage != nullptr && forward.stage->communicates()) ||
                  (backward.stage != nullptr && backward.stage->communicates());
  if (backward_op_ && backward_op_->pass == Pass::BackwardWeight) return;
  const bool weights = backward_op_ && backward_op_->pass == Pass::Backward && !context.fills_waits;
  order_ = &context.orders.find(forward, backward, weights);
}

StepRun::Event StepRun::next() {
  return explained([&] {
    if (!std::exchange(started_, true)) {
      if (forward_op_) start_forward();
      if (backward_op_ && backward_ == nullptr) start_backward();
      if (pair_)
        pair_->add_forward(forward_ ? &forward_->run() : nullptr);
      else if (order_ != nullptr)
        pair_.emplace(order_->order, forward_ ? &forward_->run() : nullptr, backward_ ? &backward_->run() : nullptr);
      own_.reset();
    }
    return advance();
  });
}

StepRun::Event StepRun::advance() {
  if (pair_) {
    const PairOp* const upcoming = communicates_ ? pair_->upcoming() : nullptr;
    const Mark begin = upcoming != nullptr ? context_.recorder.mark() : Mark();
    const Recorder::Range range = range_of(upcoming);
    if (const std::optional<PairEvent> event = pair_->next()) {
      const PairOp& op = event->op;
      switch (event->kind) {
        case PairEvent::Kind::computed:
          record(op, begin);
          if (context_.fills_waits && op.side == PairSide::backward && backward_op_->pass == Pass::Backward &&
              backward_->run().has_weight_part(op.node))
            weights_.push_back(op.node);
          return Event::ran;
        case PairEvent::Kind::launched:
          return Event::ran;
        case PairEvent::Kind::must_wait:
          return Event::must_wait;
        case PairEvent::Kind::received:
          record_received(*event);
          return Event::ran;
        case PairEvent::Kind::over:
          op.side == PairSide::forward ? end_forward() : end_backward();
          return Event::half_over;
      }
    }
  }
  if (!weights_.empty()) return Event::weights_left;
  if (input_part_over_ && backward_ != nullptr) release_backward();
  return pair_ && pair_->trails() ? Event::trails : Event::over;
}

void StepRun::wait() {
  explained([&] {
    FlightRecorder::Operation operation{.kind = FlightRecorder::Kind::collective};
    operation.step = forward_op_ ? Step{*forward_op_, backward_op_} : Step{*backward_op_, {}};
    const FlightRecorder::Id id = context_.flight.start(operation);
    const PairEvent event = pair_->wait();
    context_.flight.end(id);
    record_received(event);
  });
}

bool StepRun::run_weight_part() {
  if (weights_.empty()) return false;
  explained([&] {
    const PairOp op = own_.emplace(PairOp{PairSide::weight, weights_.front()});
    const Mark begin = context_.recorder.mark();
    const Recorder::Range range = range_of(communicates_ ? &op : nullptr);
    StageRun& run = backward_->run();
    bool more = false;
    if (context_.fills_waits)
      more = run.backward_weight_part(op.node);
    else
      run.backward_weight(op.node);
    record(op, begin);
    if (!more) weights_.pop_front();
    own_.reset();
  });
  return true;
}

const Op* StepRun::ahead_op() const { return order_ != nullptr && order_->launch_ahead > 0 ? &*backward_op_ : nullptr; }

void StepRun::launch_ahead() {
  explained([&] {
    start_backward();
    pair_.emplace(order_->order, nullptr, &backward_->run());
    own_.reset();
    for (std::size_t n = order_->launch_ahead; n-- > 0;) advance();
  });
}

void StepRun::record_step(const Step& step, const Mark& begin) {
  if (!context_.recorder.on()) return;
  own_ = {forward_op_ ? PairSide::forward : PairSide::backward, -1};
  explained([&] { context_.recorder.record(Lane::compute, step, begin, context_.recorder.mark()); });
  own_.reset();
}

bool StepRun::shares_micro_batch(const Step& later) const {
  for (const auto& op : {forward_op_, backward_op_}) {
    if (op && op->micro_batch == later.op.micro_batch) return true;
    if (op && later.overlapped && op->micro_batch == later.overlapped->micro_batch) return true;
  }
  return false;
}

void StepRun::start_forward() {
  const Op op = *forward_op_;
  own_ = {PairSide::forward, -1};
  const RunInputs& run = context_.inputs;
  const Batch* const batch = run.micro_batches.empty() ? nullptr : &run.micro_batches[op.micro_batch];
  Tensors inputs;
  SharedPairs shared;
  const std::optional<StageResult> received = input_of(op, context_.num_stages());
  if (received) {
    inputs = context_.mailbox.take(*received);
    shared = take_shared(inputs);
  } else if (batch != nullptr) {
    // Copies: in-place code at the start of the first stage must not write into the caller's batch. The host does not
    // wait for a copy to a device, which reads the batch before the step is over.
    for (const at::Tensor& input : batch->inputs) {
      inputs.push_back(page_locked(input.detach(), context_.communicator.device())
                           .to(context_.communicator.device(), input.scalar_type(), /*non_blocking=*/true,
                               /*copy=*/true));
      if (run.training && input.requires_grad()) inputs.back().set_requires_grad(true);
    }
  }
  StageLoss loss;
  if (context_.last(op) && run.loss)
    loss = [&context = context_, micro_batch = op.micro_batch, batch](const Tensors& outputs) {
      return loss_with_metrics(context, micro_batch, outputs, batch ? batch->targets : Tensors());
    };
  StageContext context{.stage = op.stage,
                       .micro_batch = op.micro_batch,
                       .step = run.step,
                       .training = run.training,
                       .extras = batch ? viewed(batch->extras) : Tensors(),
                       .generator = run.generator,
                       .random = run.random};
  if (context.random) context.random->micro_batch += op.micro_batch;
  forward_ = std::make_unique<MicroBatch>(context_.stage_of(op), inputs, context, std::move(loss), std::move(shared));
}

void StepRun::start_backward() {
  const Op op = *backward_op_;
  own_ = {PairSide::backward, -1};
  backward_ = context_.micro_batches.take({op.stage, op.micro_batch});
  if (op.pass == Pass::BackwardWeight) {
    input_part_over_ = true;
    for (int node = backward_->run().num_nodes(); node-- > 0;)
      if (backward_->run().has_weight_part(node)) weights_.push_back(node);
    return;
  }
  std::optional<Tensors> gradients;
  if (const auto received = input_of(op, context_.num_stages())) gradients = context_.mailbox.take(*received);
  // Splitting pays only where somebody waits for the input gradient, or a collective for a pause of the host.
  const bool whole = op.pass == Pass::Backward && !communicates_ && (!context_.publishes_early() || op.stage == 0);
  const double scale = context_.inputs.scale_of(op.micro_batch);
  // Zeros would become NaN where a derivative is infinite. Collectives may still bring what other replicas train.
  if (scale == 0 && !context_.inputs.communicates) gradients.reset();
  backward_->start_backward(std::move(gradients), scale, whole);
}

void StepRun::check_registered() const {
  if (!context_.inputs.training || !context_.inputs.first_step) return;
  const Tensors registered = unique_parameters(context_.stages);
  for (const at::Tensor& leaf : forward_->run().leaves()) {
    if (std::any_of(registered.begin(), registered.end(), [&](const at::Tensor& each) { return each.is_same(leaf); })) {
      const Replicas* const replicas = context_.inputs.replicas;
      DUALPIPE_CHECK(replicas == nullptr || !replicas->summed_before(leaf, forward_op_->stage), "stage ",
                     forward_op_->stage, ", its loss included, uses a parameter of sizes ", leaf.sizes(),
                     " that only another stage of this rank has registered, and whose gradients are summed over the "
                     "ranks that hold it before those of this stage are complete. Register it with the module of each "
                     "stage that uses it");
      continue;
    }
    // What a forward makes for itself, as to differentiate within it, is another tensor in each micro-batch.
    std::vector<c10::weak_intrusive_ptr<at::TensorImpl>>& seen = context_.unregistered;
    const bool again = std::any_of(seen.begin(), seen.end(),
                                   [&](const auto& each) { return each.lock().get() == leaf.unsafeGetTensorImpl(); });
    DUALPIPE_CHECK(
        !again, "stage ", forward_op_->stage, ", its loss included, uses a tensor of sizes ", leaf.sizes(),
        " that requires grad and is a parameter of none of this rank's stages. DualPipe's parameters() do "
        "not have it, its gradient is neither summed over the ranks that hold the stage nor put back after a "
        "failed step, and if a stage of another rank has it as a parameter, that trains a copy of its own. "
        "Register it with the stage's module");
    seen.emplace_back(leaf.getIntrusivePtr());
  }
}

void StepRun::end_forward() {
  const Op op = *forward_op_;
  Tensors outputs = forward_->finish_forward();
  check_registered();
  const double scale = context_.inputs.scale_of(op.micro_batch);
  if (const at::Tensor& added = forward_->run().added_loss(); added.defined() && context_.inputs.loss && scale != 0) {
    at::Tensor& sum = context_.outputs.added_losses[op.stage];
    const at::Tensor value = added.to(context_.communicator.device(), at::kDouble) * scale;
    sum = sum.defined() ? sum + value : value;
  }
  if (const auto result = output_of(op, context_.num_stages())) {
    add_shared(outputs, forward_->run().shared());
    context_.mailbox.put(*result, std::move(outputs));
  } else {
    if (const at::Tensor& loss = forward_->run().loss(); loss.defined()) context_.outputs.losses[op.micro_batch] = loss;
    if (context_.inputs.keep_outputs)
      for (const at::Tensor& output : outputs)
        context_.outputs.outputs[op.micro_batch].push_back(output.defined() ? output.detach() : output);
  }
  if (context_.inputs.training) context_.micro_batches.put({op.stage, op.micro_batch}, std::move(forward_));
  forward_.reset();
}

void StepRun::end_backward() {
  const Op op = *backward_op_;
  Tensors gradients = backward_->finish_backward();
  if (const auto result = output_of(op, context_.num_stages()))
    context_.mailbox.put(*result, std::move(gradients));
  else if (!gradients.empty())
    context_.outputs.input_gradients[op.micro_batch] = std::move(gradients);
  input_part_over_ = true;
}

/// Both parts of its backward have run, or the weight part comes as a step of its own.
void StepRun::release_backward() {
  if (backward_op_->pass == Pass::BackwardInput)
    context_.micro_batches.put({backward_op_->stage, backward_op_->micro_batch}, std::move(backward_));
  backward_.reset();
}

void StepRun::record(const PairOp& op, const Mark& begin) const {
  if (!communicates_ || !context_.recorder.on()) return;  // else the step as a whole is recorded
  context_.recorder.record(Lane::node, {recorded(op), {}}, begin, context_.recorder.mark(), node_name(op));
}

void StepRun::record_received(const PairEvent& event) const {
  if (!context_.recorder.on()) return;
  context_.recorder.record(Lane::collective, {op_of(event.op.side), {}}, event.pending, node_name(event.op));
}

Recorder::Range StepRun::range_of(const PairOp* op) const {
  if (op == nullptr) return {};
  return context_.recorder.range([&] { return to_string(recorded(*op)) + ' ' + node_name(*op); });
}

std::string StepRun::node_name(const PairOp& op) const { return context_.stage_of(op_of(op.side)).chain_name(op.node); }

Op StepRun::recorded(const PairOp& op) const {
  Op result = op_of(op.side);
  if (op.side == PairSide::weight) result.pass = Pass::BackwardWeight;
  if (op.side == PairSide::backward && result.pass == Pass::Backward && backward_->run().has_weight_part(op.node))
    result.pass = Pass::BackwardInput;
  return result;
}

template <class Body>
std::invoke_result_t<Body> StepRun::explained(const Body& body) {
  try {
    return body();
  } catch (...) {
    rethrow_explained();
  }
}

void StepRun::rethrow_explained() const {
  try {
    throw;
  } catch (const CommError& error) {
    std::throw_with_nested(CommError(error.origin_rank(), error.operation(), explain(error.what())));
  } catch (const InvalidArgument& error) {
    std::throw_with_nested(InvalidArgument(explain(error.what())));
  } catch (...) {
    std::throw_with_nested(Error(explain(current_error_text())));
  }
}

std::string StepRun::explain(const std::string& what) const {
  // Before the first op and behind the last one: the side that is named first.
  const PairSide first = forward_op_ ? PairSide::forward : PairSide::backward;
  const PairOp at = own_ ? *own_ : pair_ ? pair_->at() : PairOp{first, -1};
  const Op& op = op_of(at.side);
  const Stage& stage = context_.stage_of(op);
  std::string node;
  if (at.side == PairSide::forward) {
    if (forward_) node = forward_->run().node_name();
  } else if (at.side == PairSide::weight) {
    node = stage.chain_name(at.node);
  } else if (!own_ && backward_) {
    node = stage.chain_name(backward_->run().node());
  }
  node = !node.empty() && stage.node_names().size() > 1 ? ", node " + node : "";
  const Pass pass = at.side == PairSide::weight ? Pass::BackwardWeight : op.pass;
  return context_.explained(
      str(pass_name(pass), " of stage ", op.stage, node, ", micro-batch ", op.micro_batch, ": ", what), cell_);
}

}  // namespace dualpipe::detail
