#pragma once

#include "dualpipe/stage/stage_run.hpp"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "dualpipe/detail/stage/unused_parts.hpp"

namespace dualpipe {
namespace detail {

/// What leaves a graph: same memory, no history.
inline Tensors detach_outputs(const Tensors& outputs, bool training) {
  Tensors result;
  result.reserve(outputs.size());
  for (const auto& output : outputs) {
    result.push_back(output.defined() ? output.detach() : output);
    if (training && output.defined() && output.requires_grad()) result.back().set_requires_grad(true);
  }
  return result;
}

/// One loss without dimensions, so that its gradient is a plain number whatever the loss function makes of it.
inline at::Tensor compute_loss(const StageLoss& loss_function, const Tensors& outputs, int stage) {
  at::Tensor loss = loss_function(outputs);
  DUALPIPE_CHECK(loss.defined(), "the loss function of stage ", stage, " returned an undefined tensor");
  DUALPIPE_CHECK(loss.numel() == 1, "the loss of stage ", stage, " must be one element, got sizes ", loss.sizes(),
                 "; reduce it, for instance with mean()");
  DUALPIPE_CHECK(loss.is_floating_point(), "the loss of stage ", stage, " must be floating point, got ",
                 loss.scalar_type());
  return loss.dim() == 0 ? loss : loss.reshape({});
}

/// By position; tensors that are undefined or made in inference mode have none.
inline std::vector<std::uint32_t> versions_of(const Tensors& tensors) {
  std::vector<std::uint32_t> versions;
  for (const at::Tensor& tensor : tensors)
    versions.push_back(tensor.defined() && !tensor.is_inference() ? tensor._version() : 0);
  return versions;
}

/// Autocast keeps the casts of weights for later uses. Each has a place in the graph of the micro-batch that made it, or
/// none if that was an evaluation, so micro-batches must not see each other's.
class NoCachedCasts {
 public:
  NoCachedCasts() : before_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~NoCachedCasts() { at::autocast::set_autocast_cache_enabled(before_); }
  NoCachedCasts(const NoCachedCasts&) = delete;
  NoCachedCasts& operator=(const NoCachedCasts&) = delete;

 private:
  bool before_;
};

/// Takes out what a collective moves.
inline Tensors take_moved(Tensors& values, const std::vector<int>& moves) {
  Tensors moved;
  for (const int position : moves) {
    DUALPIPE_CHECK(position < std::ssize(values), "the collective moves the tensor at position ", position,
                   ", but it is given ", values.size(), values.size() == 1 ? " tensor" : " tensors");
    moved.push_back(std::exchange(values[position], at::Tensor()));
  }
  return moved;
}

/// Gives the buffers of a module their values back, unseen by graphs that have saved them.
class KeptBuffers {
 public:
  explicit KeptBuffers(const torch::nn::Module* module) {
    if (module == nullptr) return;
    for (const at::Tensor& buffer : module->buffers())
      if (buffer.defined() && !buffer.is_inference()) kept_.emplace_back(buffer, buffer.detach().clone());
  }
  ~KeptBuffers() {
    const at::NoGradGuard no_grad;
    for (const auto& [buffer, value] : kept_)
      if (buffer.sizes() == value.sizes()) buffer.variable_data().copy_(value);
  }
  KeptBuffers(const KeptBuffers&) = delete;
  KeptBuffers& operator=(const KeptBuffers&) = delete;

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> kept_;
};

/// LibTorch's default ones, of the CPU and of the device where the tensors are.
inline std::vector<at::Generator> generators_of(const Tensors& tensors) {
  for (const at::Tensor& tensor : tensors)
    if (tensor.defined() && !tensor.is_cpu()) return default_generators(tensor.device());
  return default_generators(at::kCPU);
}

}  // namespace detail

StageRun::StageRun(const StageRun& of, const Beginning& beginning)
    : stage_(of.stage_),
      context_(of.context_),
      random_(beginning.random),
      num_nodes_(1),
      split_(of.split_),
      owner_(of.owner_),
      values_(beginning.inputs),
      shared_(beginning.shared) {}

std::unique_ptr<StageRun::Beginning> StageRun::beginning() const {
  auto result = std::make_unique<Beginning>(
      Beginning{.inputs = values_, .versions = detail::versions_of(values_), .shared = shared_, .random = random_});
  if (!random_.on()) result->generators = detail::generators_of(values_);
  result->states = detail::states_of(result->generators);
  return result;
}

void StageRun::recompute(int index) {
  Node& node = nodes_[index];
  const std::unique_ptr<Beginning> kept = std::move(node.beginning);
  const Stage::Segment segment = stage_->segment(index);
  DUALPIPE_CHECK(
      detail::versions_of(kept->inputs) == kept->versions, "what node '", stage_->chain_name(index), "' of stage ",
      context_.stage,
      " is to be computed again from was written to in place since; return a clone() from where it comes from, "
      "or say recompute(false)");
  const c10::AutoGradMode grad_mode(true);
  const detail::KeptBuffers buffers(owner_.module.get());
  const detail::KeptStates generators(kept->generators);
  detail::set_states(kept->generators, kept->states);
  StageRun again(*this, *kept);
  again.compute(segment.begin, segment.end);
  node.graph = std::move(again.nodes_.back().graph);
}

StageRun::StageRun(const Stage& stage, Tensors inputs, StageContext context, StageLoss loss, detail::SharedPairs shared)
    : stage_(&stage),
      context_(std::move(context)),
      random_(context_.random, context_.generator),
      loss_(std::move(loss)),
      num_nodes_(stage.num_nodes(loss_ != nullptr)),
      split_(stage.splits_backward()),
      owner_{stage.module(), context_.stage},
      values_(std::move(inputs)),
      shared_(std::move(shared)) {
  const std::optional<int> takes = stage.num_inputs();
  DUALPIPE_CHECK(!takes || std::ssize(values_) == *takes, "stage ", context_.stage, " takes ", *takes,
                 *takes == 1 ? " tensor" : " tensors", ", got ", values_.size(), " (micro-batch ", context_.micro_batch,
                 ")");
  nodes_.reserve(num_nodes_);
}

void StageRun::advance() {
  settle();
  if (backward_)
    advance_backward(next_--);
  else
    advance_forward(next_++);
}

void StageRun::advance_forward(int index) {
  const c10::AutoGradMode grad_mode(context_.training);
  const Stage::Segment segment = stage_->segment(index);
  if (segment.begin == segment.end || !stage_->nodes()[segment.begin].communication) {
    std::unique_ptr<Beginning> kept = context_.training && stage_->recomputes(index) ? beginning() : nullptr;
    compute(segment.begin, segment.end);
    prepare(index + 1);
    if (!kept) return;
    Node& node = nodes_.back();
    if (context_.step == 0) kept->leaves = node.graph.leaves();
    node.graph = {};
    DUALPIPE_CHECK(detail::versions_of(kept->inputs) == kept->versions, "stage ", context_.stage,
                   " writes in place into what node '", node_name_,
                   "' is given, from which it is to be computed again; write into a clone() of it, or say "
                   "recompute(false)");
    node.beginning = std::move(kept);
    return;
  }
  const Stage::Node& node = stage_->nodes()[segment.begin];
  node_name_ = node.name;
  const detail::KeptStates generators = random_.kept_states();
  enter_layer(segment.begin, segment.begin);
  launch(node.communication);
  leave_layer(segment.begin);
}

std::string StageRun::layer_of(std::size_t index) const {
  const std::string& layer = stage_->nodes()[index].layer;
  return layer.empty() ? detail::str("stage", context_.stage) : layer;
}

void StageRun::enter_layer(std::size_t index, std::size_t begin) {
  if (!random_.on()) return;
  const Stage::Node& node = stage_->nodes()[index];
  if (index > begin) {
    if (stage_->nodes()[index - 1].layer == node.layer) return;
    leave_layer(index - 1);
  }
  node.goes_on ? random_.go_on(layer_of(index)) : random_.begin(layer_of(index));
}

void StageRun::leave_layer(std::size_t index) {
  if (random_.on() && stage_->nodes()[index].to_be_continued) random_.pause(layer_of(index));
}

void StageRun::compute(std::size_t begin, std::size_t end) {
  const detail::NoCachedCasts no_cached_casts;
  const detail::GraphInputs entered = detail::enter_graph(values_);
  const detail::SharedWrites writes(entered.tensors, shared_);
  const std::vector<std::uint32_t> extras = detail::versions_of(context_.extras);
  values_ = entered.tensors;
  const detail::KeptStates generators = random_.kept_states();
  const detail::UnusedPartsWatch unused(stage_->used_parts());
  Tensors added;
  context_.added_losses = &added;
  for (std::size_t i = begin; i < end; ++i) {
    node_name_ = stage_->nodes()[i].name;
    enter_layer(i, begin);
    unused.watch(context_.stage, [&] { values_ = stage_->nodes()[i].compute(values_, context_); });
  }
  context_.added_losses = nullptr;
  if (begin < end) leave_layer(end - 1);
  Node& node = nodes_.emplace_back();
  Tensors roots;
  if (loss_ && advanced()) {
    random_.begin("");
    unused.watch(context_.stage, [&] { roots = {detail::compute_loss(loss_, values_, context_.stage)}; });
    loss_value_ = roots[0].detach();
  } else if (context_.training) {
    roots = values_;
  }
  if (!added.empty()) {
    at::Tensor sum = added[0];
    for (std::size_t i = 1; i < added.size(); ++i) sum = sum + added[i];
    node.added = sum.detach();
    added_loss_ = added_loss_.defined() ? added_loss_ + node.added : node.added;
    roots.push_back(std::move(sum));
  }
  if (context_.training) node.graph = detail::BackwardGraph(entered, roots);
  writes.check(detail::str("stage ", context_.stage));
  DUALPIPE_CHECK(
      detail::versions_of(context_.extras) == extras, "stage ", context_.stage,
      " writes in place into its extras, which every stage sees, each rank in memory of its own; write into a "
      "clone() of them");
  shared_ = detail::shared_pairs(values_, entered.tensors, shared_);
  values_ = detail::detach_outputs(values_, context_.training);
}

void StageRun::prepare(int index) {
  if (index >= num_nodes_) return;
  const Stage::Segment segment = stage_->segment(index);
  if (segment.begin == segment.end) return;
  const auto& communication = stage_->nodes()[segment.begin].communication;
  if (!communication) return;
  Tensors moved;
  for (const int position : communication->moves) {
    if (position >= std::ssize(values_)) return;  // launch() reports it
    moved.push_back(values_[position]);
  }
  context_.prepared = communication->collective->prepare(moved);
}

void StageRun::launch(const std::shared_ptr<const Communication>& communication) {
  auto launched = communication->collective->forward(detail::take_moved(values_, communication->moves), context_);
  context_.prepared.reset();
  DUALPIPE_CHECK(launched.pending, "the collective launched nothing: its Pending is empty");
  pending_ = std::move(launched.pending);
  moving_ = communication.get();
  std::erase_if(shared_, [&](const auto& pair) {
    return std::any_of(moving_->moves.begin(), moving_->moves.end(),
                       [&](int moved) { return moved == pair.first || moved == pair.second; });
  });
  nodes_.push_back(
      {.communication = communication, .handle = context_.training ? std::move(launched.handle) : nullptr});
}

void StageRun::settle() {
  if (!pending_) return;
  const std::vector<int>& moves = moving_->moves;
  Tensors moved = std::exchange(pending_, {}).take();
  DUALPIPE_CHECK(moved.size() == moves.size(), "the collective moves ", moves.size(), " tensors, but its ",
                 backward_ ? "backward" : "forward", " gave ", moved.size());
  for (std::size_t i = 0; i < moves.size(); ++i) values_[moves[i]] = std::move(moved[i]);
}

void StageRun::finish_forward() {
  settle();
  // A collective's result says of itself whether it is differentiable; a computing node's outputs are detached.
  if (nodes_.back().communication) values_ = detail::detach_outputs(values_, context_.training);
}

Tensors StageRun::leaves() const {
  Tensors all;
  for (const Node& node : nodes_)
    for (at::Tensor& leaf : node.beginning ? node.beginning->leaves : node.graph.leaves())
      all.push_back(std::move(leaf));
  return all;
}

void StageRun::start_backward(Tensors output_gradients, bool whole_first, double added_gradient) {
  backward_ = true;
  added_gradient_ = added_gradient;
  whole_first_ = whole_first;
  next_ = num_nodes_ - 1;
  values_ = std::move(output_gradients);
}

void StageRun::advance_backward(int index) {
  Node& node = nodes_[index];
  if (!node.communication) {
    if (node.beginning) recompute(index);
    node.whole = !split_ || (index == 0 && whole_first_);
    if (node.added.defined())
      values_.push_back(added_gradient_ == 0 ? at::Tensor() : at::full_like(node.added, added_gradient_));
    values_ = node.whole ? node.graph.backward(values_) : node.graph.backward_input(values_, &owner_);
    return;
  }
  moving_ = node.communication.get();
  pending_ =
      moving_->collective->backward(std::exchange(node.handle, nullptr), detail::take_moved(values_, moving_->moves));
  DUALPIPE_CHECK(pending_, "the collective launched nothing in its backward: its Pending is empty");
}

Tensors StageRun::finish_backward() {
  settle();
  return std::move(values_);
}

bool StageRun::has_weight_part(int node) const {
  const Node& here = nodes_[node];
  return !here.communication && split_ && !here.whole;
}

void StageRun::backward_weight(int node) {
  if (has_weight_part(node)) nodes_[node].graph.backward_weight();
}

bool StageRun::backward_weight_part(int node) {
  return has_weight_part(node) && nodes_[node].graph.backward_weight_part(&owner_);
}

void StageRun::backward_weight() {
  for (int node = num_nodes_; node-- > 0;) backward_weight(node);
}

Tensors StageRun::backward(Tensors output_gradients) {
  start_backward(std::move(output_gradients), /*whole_first=*/true);
  while (!advanced()) advance();
  Tensors gradients = finish_backward();
  backward_weight();
  return gradients;
}

Tensors StageRun::backward_input(Tensors output_gradients) {
  start_backward(std::move(output_gradients));
  while (!advanced()) advance();
  return finish_backward();
}

}  // namespace dualpipe
