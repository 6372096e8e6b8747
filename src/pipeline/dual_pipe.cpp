#include "dualpipe/pipeline/dual_pipe.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "dualpipe/detail/pipeline/agree.hpp"
#include "dualpipe/detail/pipeline/arrival_memory.hpp"
#include "dualpipe/detail/pipeline/gradients.hpp"
#include "dualpipe/detail/pipeline/recorder.hpp"
#include "dualpipe/detail/pipeline/replicas.hpp"
#include "dualpipe/detail/pipeline/training_plan.hpp"
#include "dualpipe/detail/pipeline/unfinished_step.hpp"
#include "dualpipe/train/clip.hpp"

namespace dualpipe {
namespace {

/// The text of what `body` throws, empty if nothing.
template <class Body>
std::string finding_of(const Body& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return message_of(error);
  }
  return "";
}

}  // namespace

struct DualPipeImpl::State {
  State(std::shared_ptr<Communicator> comm, DualPipeOptions opts)
      : communicator(std::move(comm)), options(std::move(opts)) {}

  std::shared_ptr<Communicator> communicator;
  DualPipeOptions options;
  Plan training;
  std::map<int, Plan> forward;  // by number of micro-batches
  std::unique_ptr<Executor> executor;
  std::unique_ptr<Replicas> replicas;
  std::optional<ArrivalMemory> arrivals;
  Tensors parameters;
  std::vector<int> loss_ranks;
  std::vector<std::shared_ptr<Observer>> observers;
  std::int64_t step = 0;
  bool batches_compared = false;
  std::string failure;                                 // why no further step is possible
  std::shared_ptr<StepResult::Unfinished> unfinished;  // the step before, if nobody has waited for its device

  int rank() const { return communicator->rank(); }
  bool runs_stage(int stage) const { return executor->stages().count(stage) != 0; }
  bool feeds_inputs() const { return runs_stage(0); }
  bool computes_loss() const { return runs_stage(training.schedule.num_stages - 1); }

  const Plan& forward_plan(int num_micro_batches) {
    auto found = forward.find(num_micro_batches);
    if (found == forward.end())
      found = forward
                  .emplace(num_micro_batches,
                           make_plan(forward_only(training.schedule, num_micro_batches), options.publish))
                  .first;
    return found->second;
  }

  std::vector<Edge> edges() const {
    std::set<Edge> all;
    for (const Transfer& transfer : training.program.order) all.insert({transfer.from, transfer.to});
    for (const int from : loss_ranks)
      for (const int to : loss_ranks)
        if (from != to) all.insert({from, to});
    return {all.begin(), all.end()};
  }

  /// Splits the batch where this rank has one, after looking at whether it can.
  std::vector<Batch> micro_batches(const Batch& batch, int count) const {
    if (batch.empty()) {
      DUALPIPE_CHECK(!feeds_inputs() && !computes_loss(), "rank ", rank(), " got an empty batch, but it ",
                     feeds_inputs() ? "feeds the inputs" : "computes the loss", " of some micro-batches");
      return {};
    }
    // Slices are made where they are used; extras are used everywhere.
    if (!feeds_inputs() && !computes_loss() && batch.extras.empty() && batch.micro_batches.empty()) return {};
    return split_batch(batch, count, options.batch_dim);
  }

  /// Collective: all ranks with a batch must have the same one. Returns its number of micro-batches.
  int compare_batches(const Batch& batch) const {
    const std::size_t count = batch.micro_batches.empty() ? options.num_micro_batches : batch.micro_batches.size();
    const std::string mine = batch.empty() ? "" : detail::str(count, " micro-batches, checksum ", checksum(batch));
    const std::vector<std::string> all = all_gather_text(*communicator, mine);
    int first = -1;
    for (int r = 0; r < static_cast<int>(all.size()); ++r) {
      if (all[r].empty()) continue;
      if (first < 0) first = r;
      DUALPIPE_CHECK(all[r] == all[first], "ranks disagree about the batch: rank ", first, " has ", all[first],
                     ", rank ", r, " has ", all[r],
                     "; all ranks must pass the same data, since one feeds the inputs and another computes the loss");
    }
    return first < 0 ? options.num_micro_batches : std::stoi(all[first]);
  }

  /// Collective: splits the batch of an evaluation or prediction; any number of micro-batches.
  int prepare_forward(const Batch& batch, RunInputs& inputs) const {
    const int count = compare_batches(batch);
    agree_that_fine(*communicator, finding_of([&] { inputs.micro_batches = micro_batches(batch, count); }));
    inputs.training = false;
    inputs.step = step;
    return count;
  }

  /// Among the ranks that run the last stage: every micro-batch's outputs on all of them, merged along the batch
  /// dimension.
  Tensors merge(const Plan& plan, std::map<int, Tensors> outputs) const {
    if (!computes_loss()) return {};
    const int count = plan.schedule.num_micro_batches;
    const auto owner = [&](int micro_batch) { return plan.rank_of(plan.schedule.num_stages - 1, micro_batch); };
    std::vector<Pending> sends;
    std::map<int, Pending> receives;
    for (int m = 0; m < count; ++m) {
      if (owner(m) != rank()) {
        receives.emplace(m, communicator->receive(owner(m)));
        continue;
      }
      for (const int other : loss_ranks)
        if (other != rank()) sends.push_back(communicator->send(other, outputs.at(m)));
    }
    for (auto& [micro_batch, pending] : receives) outputs[micro_batch] = pending.take();
    for (Pending& pending : sends) pending.wait();

    Tensors merged;
    for (std::size_t i = 0; i < outputs.at(0).size(); ++i) {
      Tensors parts;
      for (int m = 0; m < count; ++m) {
        DUALPIPE_CHECK(outputs.at(m).size() == outputs.at(0).size(), "micro-batch ", m, " has ", outputs.at(m).size(),
                       " outputs, micro-batch 0 has ", outputs.at(0).size());
        const at::Tensor& part = outputs.at(m)[i];
        DUALPIPE_CHECK(part.defined() && part.dim() > options.batch_dim, "output ", i, " of the last stage ",
                       part.defined() ? detail::str("has ", part.dim(), " dimensions") : std::string("is undefined"),
                       " and cannot be merged along dimension ", options.batch_dim);
        parts.push_back(part);
      }
      merged.push_back(at::cat(parts, options.batch_dim));
    }
    return merged;
  }

  /// Runs a collective body. Whatever it throws ends it on all ranks and makes this object refuse further work.
  template <class Body>
  auto transaction(std::int64_t number, const Body& body) {
    for (const auto& observer : observers) observer->begin(number);
    try {
      auto result = body();
      for (const auto& observer : observers) observer->end(true);
      return result;
    } catch (const std::exception& error) {
      failure = message_of(error);
      communicator->abort(failure);
      for (const auto& observer : observers) observer->end(false);
      throw;
    }
  }

  /// What every call begins with: no step before has failed, not even on its device since.
  void require_healthy() {
    if (!failure.empty())
      throw Error(
          "an earlier step failed and its communicator is unusable; make a new one and a new DualPipe. It was: " +
          failure);
    try {
      if (unfinished) std::exchange(unfinished, nullptr)->check();
    } catch (const std::exception& error) {
      failure = message_of(error);
      communicator->abort(failure);
      throw;
    }
  }

  /// Before the vote, so that what an observer throws ends the step on all ranks. With any, the host waits for the
  /// device.
  void tell_observers(const RunOutputs& outputs) const {
    if (observers.empty()) return;
    communicator->fence().synchronize();
    outputs.recorder->finish();
  }

  /// Collective: over when every rank's host has come this far, and all that was announced until then agrees. Empty
  /// where the hosts themselves move the tensors.
  Pending hosts_arrived() const {
    Communicator& hosts = communicator->control();
    return &hosts == communicator.get() ? Pending() : hosts.barrier();
  }

  /// Collective: losses of all micro-batches, in memory of the host, where they are once a device has come to the end
  /// of what it was given. Who comes back from it knows that every rank's host has come this far, and that all that was
  /// announced until then agrees.
  at::Tensor vote(const RunOutputs& outputs, int num_micro_batches) const {
    at::Tensor losses = at::zeros({num_micro_batches}, at::device(communicator->device()).dtype(at::kDouble));
    for (const auto& [micro_batch, loss] : outputs.losses) losses[micro_batch].copy_(loss.reshape({}));
    Pending arrived = hosts_arrived();
    communicator->all_reduce({losses}).wait();
    at::Tensor on_host = losses.to(at::kCPU, /*non_blocking=*/true);
    if (arrived) arrived.wait();
    return on_host;
  }

  /// @param end  where the host has not waited for the device: when that is through with the step; else empty.
  StepResult result(at::Tensor losses, RunOutputs outputs, int num_micro_batches, Pending end = {}) {
    StepResult result;
    if (end) {
      result.loss = at::full({}, std::numeric_limits<double>::quiet_NaN(), at::kDouble);
      unfinished =
          std::make_shared<StepResult::Unfinished>(std::move(end), options.loss_reduction, result.loss, losses);
      result.unfinished_ = unfinished;
    } else {
      result.loss = reduced(losses, options.loss_reduction);
    }
    result.losses = std::move(losses);
    if (options.keep_outputs) {
      result.outputs.resize(num_micro_batches);
      for (auto& [micro_batch, tensors] : outputs.outputs) result.outputs[micro_batch] = std::move(tensors);
    }
    return result;
  }
};

DualPipeImpl::DualPipeImpl(std::shared_ptr<Communicator> communicator, DualPipeOptions options,
                           const StageFactory& factory)
    : torch::nn::Module("DualPipe"), state_(std::make_unique<State>(std::move(communicator), std::move(options))) {
  State& state = *state_;
  DUALPIPE_CHECK(state.communicator != nullptr, "DualPipe needs a communicator");
  Communicator& comm = *state.communicator;

  agree_that_fine(comm, finding_of([&] { state.training = training_plan(state.options, comm.size()); }));
  agree_on(comm, "options", describe(state.options, state.training.schedule));

  std::map<int, Stage> stages;
  agree_that_fine(comm, finding_of([&] {
                    for (const int number : stages_of(state.training.schedule, comm.rank())) {
                      try {
                        Stage stage = factory(number);
                        if (stage.module()) stage.module()->to(comm.device());
                        stages.emplace(number, std::move(stage));
                      } catch (const std::exception& error) {
                        throw Error(detail::str("the factory of stage ", number, " threw: ", message_of(error)));
                      }
                    }
                  }));
  const StageTraits traits = traits_of_all(comm, stages);
  state.arrivals.emplace(state.communicator, traits.data_dependent_from);
  // A pair of stages with collectives has its results in another order, and all ranks must send in the same one.
  if (traits.communicate)
    state.training = make_plan(std::move(state.training.schedule), state.options.publish, /*communicates=*/true);
  const Schedule& schedule = state.training.schedule;

  std::set<torch::nn::Module*> registered;
  for (const auto& [number, stage] : stages)
    if (stage.module() && registered.insert(stage.module().get()).second)
      register_module(detail::str("stage", number), stage.module());
  state.parameters = unique_parameters(stages);
  state.loss_ranks = holders(schedule, schedule.num_stages - 1);
  state.executor = std::make_unique<Executor>(state.communicator, std::move(stages));
  state.forward_plan(state.options.num_micro_batches);

  comm.connect(state.edges());
  state.replicas = std::make_unique<Replicas>(comm, schedule, state.executor->stages());
  state.replicas->broadcast();
  for (const auto& [number, stage] : state.executor->stages()) stage.freeze(comm.rank(), number);
}

DualPipeImpl::~DualPipeImpl() = default;

StepResult DualPipeImpl::step(const Batch& batch, const LossFn& loss) {
  State& state = *state_;
  state.require_healthy();
  RunInputs inputs;
  const int count = state.options.num_micro_batches;
  const auto prepare = [&] {
    DUALPIPE_CHECK(loss || !state.computes_loss(), "rank ", state.rank(),
                   " computes the loss but got no loss function");
    inputs.micro_batches = state.micro_batches(batch, count);
  };
  if (!state.batches_compared) {
    // The first step can afford to find out on all ranks at once; it leaves the communicator usable.
    agree_that_fine(*state.communicator, finding_of(prepare));
    state.compare_batches(batch);
    state.batches_compared = true;
  }
  return state.transaction(state.step, [&] {
    if (inputs.micro_batches.empty()) prepare();
    inputs.loss = loss;
    inputs.loss_scale = state.options.loss_reduction == LossReduction::mean ? 1.0 / count : 1.0;
    inputs.step = state.step++;
    inputs.keep_outputs = state.options.keep_outputs;
    inputs.arrivals = state.arrivals->recall(state.training, inputs, *this);

    GradientTransaction gradients(state.parameters);
    RunOutputs outputs = state.executor->run(state.training, inputs, state.observers);
    state.replicas->sum_gradients();
    state.replicas->broadcast_buffers();
    state.tell_observers(outputs);
    at::Tensor losses = state.vote(outputs, count);
    Pending end = state.communicator->fence();
    const bool later = state.options.asynchronous && !end.done();
    if (!later) end.synchronize();  // the only wait of the host for a device
    gradients.commit();
    end = later ? state.communicator->fence() : Pending();
    return state.result(std::move(losses), std::move(outputs), count, std::move(end));
  });
}

StepResult DualPipeImpl::evaluate(const Batch& batch, const LossFn& loss) {
  State& state = *state_;
  state.require_healthy();
  RunInputs inputs;
  agree_that_fine(*state.communicator, finding_of([&] {
    DUALPIPE_CHECK(loss || !state.computes_loss(), "rank ", state.rank(),
                   " computes the loss but got no loss function");
  }));
  const int count = state.prepare_forward(batch, inputs);
  inputs.loss = loss;
  inputs.keep_outputs = state.options.keep_outputs;
  return state.transaction(state.step, [&] {
    const Plan& plan = state.forward_plan(count);
    inputs.arrivals = state.arrivals->recall(plan, inputs, *this);
    RunOutputs outputs = state.executor->run(plan, inputs, state.observers);
    state.tell_observers(outputs);
    at::Tensor losses = state.vote(outputs, count);
    state.communicator->fence().synchronize();
    return state.result(std::move(losses), std::move(outputs), count);
  });
}

Tensors DualPipeImpl::predict(const Batch& batch) {
  State& state = *state_;
  state.require_healthy();
  RunInputs inputs;
  const int count = state.prepare_forward(batch, inputs);
  inputs.keep_outputs = true;
  return state.transaction(state.step, [&] {
    const Plan& plan = state.forward_plan(count);
    inputs.arrivals = state.arrivals->recall(plan, inputs, *this);
    RunOutputs outputs = state.executor->run(plan, inputs, state.observers);
    state.tell_observers(outputs);
    Tensors merged = state.merge(plan, std::move(outputs.outputs));
    if (Pending arrived = state.hosts_arrived()) arrived.wait();
    state.communicator->fence().synchronize();
    return merged;
  });
}

torch::Tensor DualPipeImpl::clip_grad_norm_(double max_norm) {
  return clip_grad_norm(*state_->communicator, state_->replicas->counted_parameters(), state_->parameters, max_norm);
}

void DualPipeImpl::broadcast_parameters() { state_->replicas->broadcast(); }

void DualPipeImpl::add_observer(std::shared_ptr<Observer> observer) {
  DUALPIPE_CHECK(observer != nullptr, "add_observer got no observer");
  state_->observers.push_back(std::move(observer));
}

const Schedule& DualPipeImpl::schedule() const { return state_->training.schedule; }

std::vector<int> DualPipeImpl::local_stages() const { return stages_of(schedule(), state_->rank()); }

bool DualPipeImpl::feeds_inputs() const { return state_->feeds_inputs(); }

bool DualPipeImpl::computes_loss() const { return state_->computes_loss(); }

std::vector<torch::Tensor> DualPipeImpl::parameters(bool recurse) const { return named_parameters(recurse).values(); }

torch::OrderedDict<std::string, torch::Tensor> DualPipeImpl::named_parameters(bool recurse) const {
  torch::OrderedDict<std::string, torch::Tensor> unique;
  std::set<at::TensorImpl*> seen;
  for (const auto& item : torch::nn::Module::named_parameters(recurse))
    if (seen.insert(item.value().unsafeGetTensorImpl()).second) unique.insert(item.key(), item.value());
  return unique;
}

}  // namespace dualpipe
