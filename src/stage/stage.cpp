#include "dualpipe/stage/stage.hpp"

#include <algorithm>
#include <utility>

#include "dualpipe/stage/stage_pass.hpp"

namespace dualpipe {

Tensors StageActivation::backward(const Tensors& output_gradients) {
  BackwardPass pass(*this, output_gradients, /*whole_first=*/true);
  while (!pass.advanced()) pass.advance();
  Tensors gradients = pass.take();
  backward_weight();
  return gradients;
}

Tensors StageActivation::backward_input(const Tensors& output_gradients) {
  BackwardPass pass(*this, output_gradients);
  while (!pass.advanced()) pass.advance();
  return pass.take();
}

void StageActivation::backward_weight() {
  for (int node = static_cast<int>(nodes.size()); node-- > 0;) backward_weight(node);
}

void StageActivation::backward_weight(int node) {
  if (has_weight_part(node)) nodes[static_cast<std::size_t>(node)].graph.backward_weight();
}

bool StageActivation::backward_weight_part(int node) {
  return has_weight_part(node) && nodes[static_cast<std::size_t>(node)].graph.backward_weight_part();
}

bool StageActivation::has_weight_part(int node) const {
  const Node& here = nodes[static_cast<std::size_t>(node)];
  return !here.communication && split && !here.whole;
}

Stage::Stage(std::shared_ptr<torch::nn::Module> module) : module_(std::move(module)) {}

Stage& Stage::compute(std::string name, Compute compute) {
  DUALPIPE_CHECK(compute != nullptr, "node '", name, "' of a stage has no function");
  add({std::move(name), std::move(compute), nullptr});
  return *this;
}

Stage& Stage::communicate(std::string name, std::shared_ptr<Collective> collective, std::vector<int> moves) {
  DUALPIPE_CHECK(collective != nullptr, "node '", name, "' of a stage has no collective");
  DUALPIPE_CHECK(!moves.empty(), "node '", name, "' of a stage moves no tensors; name their positions");
  for (std::size_t i = 0; i < moves.size(); ++i) {
    DUALPIPE_CHECK(moves[i] >= 0 && std::count(moves.begin(), moves.end(), moves[i]) == 1, "node '", name,
                   "' of a stage moves the tensor at position ", moves[i],
                   moves[i] < 0 ? "; positions count from 0" : " twice");
  }
  add({std::move(name), nullptr,
       std::make_shared<const Communication>(Communication{std::move(collective), std::move(moves)})});
  return *this;
}

void Stage::change(const std::string& what) {
  DUALPIPE_CHECK(built_.stage() < 0, "rank ", built_.rank(), ", stage ", built_.stage(), ": ", what,
                 " after a pipeline was built of it, which would not notice; do it in the stage factory, or change a "
                 "copy and build another pipeline");
  built_ = Built();
}

void Stage::add(Node node) {
  change(detail::str("node '", node.name, "' is added"));
  const std::size_t index = nodes_.size();
  const bool joins = !node.communication && !nodes_.empty() && !nodes_.back().communication;
  nodes_.push_back(std::move(node));
  if (joins) {
    chain_.back().end = index + 1;
  } else {
    chain_.push_back({index, index + 1});
  }
}

Stage& Stage::append(const std::string& name, const Stage& next) {
  change(detail::str("stage '", name, "' is appended"));
  if (nodes_.empty()) num_inputs_ = next.num_inputs_;
  split_ = split_ && next.split_;
  data_dependent_shapes_ = data_dependent_shapes_ || next.data_dependent_shapes_;
  for (std::size_t i = 0, count = next.nodes_.size(); i < count; ++i) {
    Node node = next.nodes_[i];
    node.name = name + "." + node.name;
    add(std::move(node));
  }
  return *this;
}

Stage& Stage::split_backward(bool split) {
  change("split_backward is set");
  split_ = split;
  return *this;
}

Stage& Stage::data_dependent_shapes(bool depend) {
  change("data_dependent_shapes is set");
  data_dependent_shapes_ = depend;
  return *this;
}

Stage& Stage::takes(int num_inputs) {
  DUALPIPE_CHECK(num_inputs >= 0, "a stage cannot take ", num_inputs, " tensors");
  change("takes is set");
  num_inputs_ = num_inputs;
  return *this;
}

std::vector<std::string> Stage::node_names() const {
  std::vector<std::string> names;
  for (const auto& node : nodes_) names.push_back(node.name);
  return names;
}

std::string Stage::structure(bool with_loss) const {
  std::string letters;
  for (const Segment& segment : chain_) letters += nodes_[segment.begin].communication ? 'X' : 'C';
  if (letters.empty() || (with_loss && letters.back() == 'X')) letters += 'C';
  return letters;
}

bool Stage::communicates() const {
  return std::any_of(nodes_.begin(), nodes_.end(), [](const Node& node) { return node.communication != nullptr; });
}

std::string Stage::chain_name(int node) const {
  const auto index = static_cast<std::size_t>(node);
  if (index >= chain_.size()) return chain_.empty() ? "identity" : "loss";
  const std::string& first = nodes_[chain_[index].begin].name;
  const std::string& last = nodes_[chain_[index].end - 1].name;
  return chain_[index].end - chain_[index].begin == 1 ? first : first + " to " + last;
}

StageActivation Stage::forward(const Tensors& inputs, const StageContext& context, const StageLoss& loss) const {
  ForwardPass pass(*this, inputs, context, loss);
  while (!pass.advanced()) pass.advance();
  return pass.take();
}

}  // namespace dualpipe
