#pragma once

#include "dualpipe/detail/pipeline/pipeline_state.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/host.hpp"
#include "dualpipe/detail/pipeline/buffers.hpp"
#include "dualpipe/detail/pipeline/call_batch.hpp"
#include "dualpipe/detail/pipeline/finite.hpp"
#include "dualpipe/detail/pipeline/gradients.hpp"
#include "dualpipe/detail/pipeline/merge_outputs.hpp"
#include "dualpipe/detail/pipeline/training_plan.hpp"
#include "dualpipe/detail/pipeline/unfinished_step.hpp"
#include "dualpipe/detail/stage/layer_random.hpp"
#include "dualpipe/train/clip.hpp"

namespace dualpipe::detail {

/// LibTorch's generators, as all ranks have them.
struct GeneratorsOfAll {
  bool shared = false;                     ///< some ranks are threads of one process
  std::optional<std::uint64_t> seed = {};  ///< if all ranks have the same one; where nobody sets it, processes differ
};

/// Collective.
inline GeneratorsOfAll generators_of_all(Communicator& world) {
  const at::Generator generator = default_generators(at::kCPU)[0];
  const std::string seed = std::to_string(generator.current_seed());
  const std::string identity =
      str(process_identity(), '-', static_cast<const void*>(generator.unsafeGetGeneratorImpl()));
  std::set<std::string> identities, seeds;
  for (const std::string& text : all_gather_text(world, seed + ' ' + identity)) {
    seeds.insert(text.substr(0, text.find(' ')));
    identities.insert(text.substr(text.find(' ')));
  }
  GeneratorsOfAll all{.shared = std::ssize(identities) < world.size()};
  if (!all.shared && seeds.size() == 1) all.seed = generator.current_seed();
  return all;
}

/// The stages of this rank, on the communicator's device.
inline std::map<int, Stage> made_stages(const Schedule& schedule, Communicator& world, const Communicator& communicator,
                                        const StageFactory& factory, const std::optional<std::uint64_t>& seed) {
  // Ranks that are threads make seeded stages one after the other, as they draw from one generator.
  SharedValues* const shared = world.control().shared_values();
  const auto mutex = seed && shared ? shared->get<std::shared_ptr<std::mutex>>(
                                          "seeded factories", [] { return std::make_shared<std::mutex>(); })
                                    : nullptr;
  std::unique_lock<std::mutex> lock;
  if (mutex) lock = std::unique_lock(**mutex);
  std::map<int, Stage> stages;
  for (const int number : stages_of(schedule, communicator.rank())) {
    const std::string error = finding_of([&] {
      Stage stage = seed ? factory.make(number, *seed, communicator.device()) : factory(number);
      if (stage.module()) stage.module()->to(communicator.device());
      stages.emplace(number, std::move(stage));
    });
    if (!error.empty()) throw Error(str("the factory of stage ", number, " threw: ", error));
    const Stage& stage = stages.at(number);
    DUALPIPE_CHECK(!stage.node_names().empty() || !stage.module() || stage.module()->parameters().empty(), "stage ",
                   number,
                   " has a module with parameters, but no node that computes with them, so it would return its "
                   "inputs; as_stage(module) makes a node of the module's forward, Stage::compute adds one");
  }
  return stages;
}

/// Calls the caller's own function, whose state may change.
inline LossFn referred(const LossFn& loss) {
  if (!loss) return nullptr;
  return [&loss](const Tensors& outputs, const Tensors& targets) { return loss.values(outputs, targets); };
}

/// Where the rank leaves its record; empty where the options name no folder.
inline std::string record_path(const DualPipeOptions& options, const Communicator& communicator) {
  if (options.record_to.empty()) return {};
  return str(options.record_to, "/rank-", communicator.world_rank(communicator.rank()), ".json");
}

/// @throws InvalidArgument  with the path and the reason.
inline void make_folder(const std::string& path) {
  std::error_code error;
  if (!path.empty()) std::filesystem::create_directories(path, error);
  DUALPIPE_CHECK(!error, "record_to: cannot make the folder ", path, ": ", error.message());
}

/// Undefined where there are none.
inline at::Tensor tensor_of(const std::vector<double>& numbers) {
  return numbers.empty() ? at::Tensor() : at::tensor(numbers, at::kDouble);
}

inline std::vector<int> sum_order_of(const Plan& plan) {
  std::vector<int> stages;
  for (const Reduction& reduction : plan.program.reductions) stages.push_back(reduction.stage);
  return stages;
}

PipelineState::PipelineState(Ranks ranks, DualPipeOptions options, const StageFactory& factory, IsExpert is_expert)
    : ranks_(std::move(ranks)),
      communicator_(ranks_.pipeline),
      options_(std::move(options)),
      is_expert_(std::move(is_expert)),
      flight_(communicator_->world_rank(communicator_->rank()), numbers()),
      health_(communicator_, flight_, record_path(options_, *communicator_)) {
  const std::string finding = finding_of([&] {
    DUALPIPE_CHECK(ranks_.shape.expert == 1 || is_expert_, "the mesh has expert groups of ", ranks_.shape.expert,
                   " ranks, but nothing says which parameters are theirs, so all ranks that hold a stage would get the "
                   "same experts; pass is_expert, or a mesh with expert = 1");
    DUALPIPE_CHECK(!options_.asynchronous || options_.on_non_finite != OnNonFinite::skip,
                   "an asynchronous step hands out its gradients before anybody knows whether they are finite, so it "
                   "cannot be skipped; set on_non_finite to error or keep, or asynchronous to false");
    make_folder(options_.record_to);
    training_ = training_plan(options_, *communicator_, ranks_.shape.data);
    DUALPIPE_CHECK(factory.num_stages() == 0 || factory.num_stages() == schedule().num_stages, "the model is cut into ",
                   factory.num_stages(), " stages, but ", options_.schedule, " on ", communicator_->size(),
                   " ranks has ", schedule().num_stages);
  });
  agree_that_fine(world(), finding);
  agree_on(world(), "options", describe(options_, *training_));
  const GeneratorsOfAll generators = generators_of_all(world());
  seed_ = options_.seed ? options_.seed : generators.seed;

  std::map<int, Stage> stages;
  agree_that_fine(world(),
                  finding_of([&] { stages = made_stages(schedule(), world(), *communicator_, factory, seed_); }));
  if (seed_) {
    generator_ = default_generators(communicator_->device()).back();
    if (generators.shared) generator_ = generator_.clone();
  }
  traits_ = traits_of_all(world(), stages);
  // A pair of stages with collectives has its results in another order, and all ranks must send in the same one.
  if (traits_.communicate) training_ = communicating_plan(*training_, *communicator_, ranks_.shape.data);
  plans_ = std::make_unique<Plans>(*communicator_, options_, training_, ranks_.shape.data, traits_.communicate);
  plan_of(options_.num_micro_batches);
  plans_->forward(options_.num_micro_batches);
  arrivals_ = std::make_unique<ArrivalMemory>(communicator_, traits_.data_dependent_from);
  parameters_ = unique_parameters(stages);
  feeding_ranks_ = holders(schedule(), 0);
  loss_ranks_ = holders(schedule(), schedule().num_stages - 1);
  executor_ = std::make_unique<Executor>(communicator_, std::move(stages), flight_);
}

void PipelineState::add_observer(std::shared_ptr<Observer> observer) {
  std::vector<StageSize> sizes(schedule().num_stages);
  for (const auto& [number, stage] : stages()) {
    if (!stage.module()) continue;
    StageSize& size = sizes[number];
    for (const at::Tensor& parameter : unique_parameters({{number, stage}})) {
      size.parameters += static_cast<double>(parameter.numel());
      size.bytes += static_cast<double>(parameter.nbytes());
    }
    for (const at::Tensor& buffer : stage.module()->buffers())
      if (buffer.defined()) size.bytes += static_cast<double>(buffer.nbytes());
  }
  observer->stages(sizes);
  observers_.add(std::move(observer));
}

void PipelineState::start() {
  flight_.together("connect", [&] { communicator_->connect(edges()); });
  flight_.together("broadcast of parameters", [&] {
    replicas_ = std::make_unique<Replicas>(world(), ranks_.shape, schedule(), stages(), is_expert_,
                                           sum_order_of(*training_), options_);
    replicas_->broadcast();
  });
  for (const auto& [number, stage] : stages()) stage.freeze(communicator_->world_rank(rank()), number);
}

std::vector<Communicator::Edge> PipelineState::edges() const {
  std::set<Communicator::Edge> all(training_->edges.begin(), training_->edges.end());
  for (const std::vector<int>* ranks : {&feeding_ranks_, &loss_ranks_})
    for (const int from : *ranks)
      for (const int to : *ranks)
        if (from != to) all.insert({from, to});
  return {all.begin(), all.end()};
}

CallAgreement PipelineState::enter(Call call, const Batch& batch, const LossFn* loss, RunInputs& inputs) {
  health_.require();
  flight_.set_step(step_);
  const bool trains = call == Call::step;
  const bool predicts = call == Call::predict || call == Call::predict_everywhere;
  CallStatement mine;
  mine.call = call;
  mine.step = step_;
  mine.observed = !observers_.all().empty();
  mine.finding = finding_of([&] {
    const std::string before = observers_.take_error();
    DUALPIPE_CHECK(before.empty(), before);
    DUALPIPE_CHECK(loss == nullptr || *loss || !computes_loss(), "rank ", communicator_->world_rank(rank()),
                   " computes the loss but got no loss function");
    const BatchUse use{.rank = communicator_->world_rank(rank()),
                       .feeds_inputs = feeds_inputs(),
                       .computes_loss = loss != nullptr && computes_loss(),
                       .num_micro_batches = options_.num_micro_batches,
                       .batch_dim = options_.batch_dim,
                       .split = options_.split,
                       .trains = trains,
                       .sizes = predicts};
    inputs.micro_batches = prepare(batch, use, mine);
    if (!trains) return;
    mine.input_gradients = wants_input_gradients(inputs.micro_batches);
    mine.trainable = replicas_->trainable();
  });
  constexpr std::array names{"begin of step()", "begin of evaluate()", "begin of predict()", "begin of predict()"};
  const auto statements = health_.guarded([&] {
    return flight_.together(names[static_cast<std::size_t>(call)], [&] { return exchange_statements(world(), mine); });
  });
  const CallAgreement agreed = agreement(statements, ranks_.shape, ranks_.replica(), trains ? step_ : -1, numbers());
  observers_.set_observed(*communicator_, agreed.observed);
  if (trains && options_.compare_replicas_every > 0 && steps_run_ % options_.compare_replicas_every == 0) {
    const std::string difference = health_.guarded(
        [&] { return flight_.together("comparison of copies", [&] { return replicas_->difference(); }); });
    DUALPIPE_CHECK(difference.empty(), difference);
  }
  inputs.training = trains;
  inputs.step = step_;
  inputs.first_step = steps_run_ == 0;
  if (seed_) {
    inputs.random = RandomKey{.seed = *seed_,
                              .step = step_,
                              .micro_batch = ranks_.replica() * agreed.num_micro_batches,
                              .call = trains ? 0 : ++calls_};
    inputs.generator = generator_;
  }
  inputs.keep_outputs = options_.keep_outputs || predicts;
  inputs.communicates = traits_.communicate;
  if (!agreed.weights.empty()) {
    const auto begin = agreed.weights.begin() + ranks_.replica() * agreed.num_micro_batches;
    inputs.weights.assign(begin, begin + agreed.num_micro_batches);
  }
  const double sum = agreed.weights.empty() ? static_cast<double>(ranks_.shape.data * agreed.num_micro_batches)
                                            : std::accumulate(agreed.weights.begin(), agreed.weights.end(), 0.0);
  inputs.loss_scale = options_.loss_reduction == LossReduction::mean ? 1.0 / sum : 1.0;
  return agreed;
}

std::shared_ptr<const Plan> PipelineState::plan_of(int num_micro_batches) {
  auto plan = plans_->training(num_micro_batches);
  const int ordered = ordered_micro_batches(*training_, options_, num_micro_batches);
  if (ordered != num_micro_batches && !std::exchange(warned_, true) && world().rank() == 0)
    TORCH_WARN("a step of ", num_micro_batches, " micro-batches runs the order that ", options_.schedule, " has on ",
               communicator_->size(), " ranks for ", ordered,
               ", without those that are not there, since it has none "
               "for that number. Gradients are the same; ranks idle longer. This is said once");
  if (std::exchange(described_, num_micro_batches) != num_micro_batches)
    flight_.describe(schedule().name, schedule().num_stages, num_micro_batches, traits_.run);
  return plan;
}

template <class Body>
auto PipelineState::observed(const Body& body, const bool* dropped) {
  const std::int64_t number = step_;
  try {
    auto result = health_.guarded([&] {
      observers_.begin(number);
      return body();
    });
    observers_.end(number, dropped == nullptr || !*dropped);
    return result;
  } catch (...) {
    observers_.end(number, false);
    throw;
  }
}

StepResult PipelineState::step(const Batch& batch, const LossFn& loss, const torch::nn::Module& module) {
  RunInputs inputs;
  const CallAgreement agreed = enter(Call::step, batch, &loss, inputs);
  const MicroBatchCount count = count_of(agreed);
  const std::shared_ptr<const Plan> plan = plan_of(count.of_replica);
  inputs.loss = referred(loss);
  inputs.replicas = replicas_.get();
  replicas_->set_sum_order(stages(), sum_order_of(*plan));
  // They outlive what is guarded: nothing is restored before the communicator was aborted and writes no more.
  std::optional<GradientTransaction> gradients;
  std::optional<BufferTransaction> buffers;
  std::string infinite;  // what is not finite, the same on all ranks
  bool dropped = false;
  Tensors of_inputs;
  const auto body = [&] {
    const std::int64_t number = step_++;
    ++steps_run_;
    calls_ = 0;
    inputs.arrivals = arrivals_->known_arrivals(plan, inputs, module);
    DeviceHashes hashes(*communicator_, batch);
    gradients.emplace(parameters_, options_.gradient_dtype,
                      [this](const at::Tensor& parameter) { return replicas_->owns(parameter); });
    buffers.emplace(module);
    RunOutputs outputs = executor_->run(*plan, inputs, observers_.all());
    flight_.together("sum of gradients", [&] {
      replicas_->finish_sums(*outputs.recorder);
      replicas_->combine_buffers(*buffers);
    });
    gradients->add_up();
    const FiniteCheck finite(options_.on_non_finite == OnNonFinite::keep ? Tensors() : gradients_of(outputs));
    if (agreed.input_gradients) of_inputs = gathered_input_gradients(*plan, batch, inputs, outputs);
    observers_.finish(*communicator_, world(), outputs);
    if (options_.asynchronous) {
      const MemberHashes before = std::exchange(last_hashes_, std::move(hashes)).values();
      if (const auto step = std::exchange(last_step_, nullptr)) step->finish();
      Pending end;
      StepVote all =
          flight_.together("vote", [&] { return vote_ahead(world(), outputs, count, before, finite.count(), end); });
      check_hashes(all.hashes, ranks_.shape, number - 1, numbers());
      gradients->commit();
      buffers->commit();
      return result_ahead(std::move(all), std::move(outputs), agreed, std::move(end), number);
    }
    communicator_->fence().synchronize();  // the only wait of the host for a device
    StepVote all = flight_.together(
        "vote", [&] { return vote(world(), outputs, count, hashes.values(), finding_of_gradients(finite)); });
    check_hashes(all.hashes, ranks_.shape, number, numbers());
    if (options_.on_non_finite != OnNonFinite::keep) infinite = non_finite(all, agreed.weights, count);
    dropped = !infinite.empty();
    if (!dropped) {
      gradients->commit();
      buffers->commit();
    }
    return result(all, std::move(outputs), agreed);
  };
  StepResult found = observed(body, &dropped);
  DUALPIPE_CHECK(!dropped || options_.on_non_finite == OnNonFinite::skip, "step ", step_, " is not finite: ", infinite,
                 ". Gradients and buffers are what they were before it. With DualPipeOptions::on_non_finite = skip "
                 "step() leaves such steps out and says so, with keep it hands out their gradients");
  found.input_gradients = std::move(of_inputs);
  found.skipped = dropped;
  return found;
}

Tensors PipelineState::gradients_of(const RunOutputs& outputs) const {
  Tensors gradients;
  for (const at::Tensor& parameter : parameters_) gradients.push_back(parameter.grad());
  for (const auto& [micro_batch, of_inputs] : outputs.input_gradients)
    gradients.insert(gradients.end(), of_inputs.begin(), of_inputs.end());
  return gradients;
}

Tensors PipelineState::gathered_input_gradients(const Plan& plan, const Batch& batch, const RunInputs& inputs,
                                                RunOutputs& outputs) {
  return flight_.together("gradients of inputs", [&] {
    if (!feeds_inputs() || !wants_input_gradients(inputs.micro_batches)) return Tensors();
    const std::vector<Tensors> all =
        gather_from(*communicator_, plan, /*stage=*/0, feeding_ranks_, std::move(outputs.input_gradients));
    return input_gradients(batch, inputs.micro_batches, all, options_);
  });
}

std::vector<std::string> PipelineState::tied_names(const std::string& name) const {
  for (const auto& [stage, unused] : stages()) {
    const std::string prefix = str("stage", stage, '.');
    const Tie* const tie =
        name.starts_with(prefix) ? replicas_->ties().find(stage, name.substr(prefix.size())) : nullptr;
    if (tie == nullptr) continue;
    std::vector<std::string> names;
    for (const auto& place : tie->places) names.push_back(str("stage", place.stage, '.', place.name));
    return names;
  }
  return {name};
}

std::string PipelineState::finding_of_gradients(const FiniteCheck& check) const {
  const std::vector<std::size_t> found = check.found();
  if (found.empty()) return {};
  if (found.front() >= parameters_.size())
    return str("the gradient of an input on rank ", communicator_->world_rank(rank()));
  const at::Tensor& first = parameters_[found.front()];
  for (const auto& [number, stage] : stages()) {
    if (!stage.module()) continue;
    for (const auto& item : stage.module()->named_parameters())
      if (item.value().is_same(first))
        return str("the gradient of parameter '", item.key(), "' of stage ", number, " on rank ",
                   communicator_->world_rank(rank()),
                   found.size() > 1 ? str(" and of ", found.size() - 1, " more there") : "");
  }
  return {};
}

RunOutputs PipelineState::run_forward(const std::shared_ptr<const Plan>& plan, RunInputs& inputs,
                                      const torch::nn::Module& module) {
  inputs.arrivals = arrivals_->known_arrivals(plan, inputs, module);
  RunOutputs outputs = executor_->run(*plan, inputs, observers_.all());
  observers_.finish(*communicator_, world(), outputs);
  return outputs;
}

StepResult PipelineState::evaluate(const Batch& batch, const LossFn& loss, const torch::nn::Module& module) {
  RunInputs inputs;
  const CallAgreement agreed = enter(Call::evaluate, batch, &loss, inputs);
  const MicroBatchCount count = count_of(agreed);
  inputs.loss = loss;
  return observed([&] {
    DeviceHashes hashes(*communicator_, batch);
    RunOutputs outputs = run_forward(plans_->forward(count.of_replica), inputs, module);
    communicator_->fence().synchronize();
    StepVote all = flight_.together("vote", [&] { return vote(world(), outputs, count, hashes.values()); });
    check_hashes(all.hashes, ranks_.shape, -1, numbers());
    return result(all, std::move(outputs), agreed);
  });
}

Tensors PipelineState::predict(const Batch& batch, bool everywhere, const torch::nn::Module& module) {
  RunInputs inputs;
  const CallAgreement agreed = enter(everywhere ? Call::predict_everywhere : Call::predict, batch, nullptr, inputs);
  std::vector<int> receivers = loss_ranks_;
  if (everywhere) {
    receivers.resize(communicator_->size());
    std::iota(receivers.begin(), receivers.end(), 0);
  }
  Tensors merged;
  const std::vector<std::string> findings = observed([&] {
    const auto plan = plans_->forward(static_cast<int>(agreed.num_micro_batches));
    DeviceHashes hashes(*communicator_, batch);
    RunOutputs outputs = run_forward(plan, inputs, module);
    std::vector<std::string> found = flight_.together("merge of predictions", [&] {
      std::string finding;
      if (everywhere || computes_loss()) {
        const auto all =
            gather_from(*communicator_, *plan, schedule().num_stages - 1, receivers, std::move(outputs.outputs));
        finding = finding_of([&] { merged = merge_outputs(all, agreed.sizes, options_); });
      }
      return all_gather_text(world(), finding);
    });
    communicator_->fence().synchronize();
    const StepVote all = flight_.together("vote", [&] { return vote(world(), {}, count_of({}), hashes.values()); });
    check_hashes(all.hashes, ranks_.shape, -1, numbers());
    return found;
  });
  throw_findings(findings, numbers());
  return merged;
}

Batch PipelineState::broadcast_batch(const Batch& batch) {
  health_.require();
  CallStatement mine;
  mine.call = Call::broadcast_batch;
  if (rank() == 0)
    mine.finding = finding_of([&] { DUALPIPE_CHECK(!batch.empty(), "broadcast_batch got an empty batch"); });
  return health_.watched([&] {
    return flight_.together("broadcast_batch", [&] {
      agree_on_call(mine);
      return sent_batch(*communicator_, batch, feeding_ranks_, loss_ranks_);
    });
  });
}

void PipelineState::broadcast_parameters() {
  CallStatement mine;
  mine.call = Call::broadcast_parameters;
  health_.watched([&] {
    flight_.together("broadcast of parameters", [&] {
      agree_on_call(mine);
      replicas_->broadcast();
    });
  });
}

at::Tensor PipelineState::clip_grad_norm(double max_norm, bool error_if_nonfinite) {
  CallStatement mine;
  mine.call = Call::clip_grad_norm;
  return health_.watched([&] {
    return flight_.together("clip_grad_norm_", [&] {
      agree_on_call(mine);
      return dualpipe::clip_grad_norm(world(), replicas_->counted_parameters(), parameters_, max_norm,
                                      error_if_nonfinite);
    });
  });
}

void PipelineState::update_parameters(const std::string& finding, const std::function<void()>& update) {
  CallStatement mine;
  mine.call = Call::optimizer_step;
  mine.finding = finding;
  mine.trainable = replicas_->trainable();
  health_.watched([&] { flight_.together("ShardedOptimizer::step()", [&] { agree_on_call(mine); }); });
  health_.guarded([&] {
    update();
    flight_.together("broadcast of updated parameters", [&] { replicas_->broadcast_owned(); });
    flight_.together("vote", [&] { world().commit(""); });
  });
}

StepResult PipelineState::result(const StepVote& vote, RunOutputs outputs, const CallAgreement& agreed) {
  StepResult result;
  result.losses = vote.losses;
  result.loss = reduced(result.losses, options_.loss_reduction, tensor_of(agreed.weights));
  // Views: after an asynchronous step they hold when the copy to the host is over.
  result.metrics = vote.sums.narrow(0, 0, std::max<std::int64_t>(0, vote.num_metrics));
  result.added_losses = vote.sums.narrow(0, LossFn::max_metrics, schedule().num_stages);
  if (options_.keep_outputs) {
    result.outputs.resize(agreed.num_micro_batches);
    for (auto& [micro_batch, tensors] : outputs.outputs) result.outputs[micro_batch] = std::move(tensors);
  }
  return result;
}

StepResult PipelineState::result_ahead(StepVote vote, RunOutputs outputs, const CallAgreement& agreed, Pending end,
                                       std::int64_t step) {
  const bool over = !end || end.done();
  const MicroBatchCount count = count_of(agreed);
  const at::Tensor numbers = vote.losses;
  vote.losses = numbers.narrow(0, 0, count.all());
  StepResult result = this->result(vote, std::move(outputs), agreed);
  if (!over) result.loss.fill_(std::numeric_limits<double>::quiet_NaN());
  std::function<std::string()> finding;
  if (options_.on_non_finite != OnNonFinite::keep) {
    finding = [numbers, weights = agreed.weights, count, step] {
      std::string text;
      add_non_finite_losses(numbers, weights, count, text);
      const double gradients = numbers.const_data_ptr<double>()[count.all()];
      if (gradients != 0) text += str(text.empty() ? "" : ", ", gradients, " gradients, those of each rank counted");
      return text.empty() ? text : str("step ", step + 1, " is not finite: ", text);
    };
  }
  last_step_ = std::make_shared<UnfinishedStep>(over ? Pending() : std::move(end), options_.loss_reduction, result.loss,
                                                result.losses, tensor_of(agreed.weights), std::move(finding));
  result.unfinished_ = last_step_;
  if (!over) health_.watch(last_step_);
  return result;
}

}  // namespace dualpipe::detail
