#pragma once

#include "dualpipe/stage/stage.hpp"

#include <algorithm>
#include <utility>

#include "dualpipe/detail/stage/module_parts.hpp"
#include "dualpipe/stage/stage_run.hpp"

namespace dualpipe {

void StageContext::add_loss(const at::Tensor& loss) const {
  DUALPIPE_CHECK(added_losses != nullptr, "add_loss of stage ", stage,
                 " was called outside of a compute function, or of a collective; the context of one call is for that "
                 "call");
  DUALPIPE_CHECK(loss.defined(), "stage ", stage, " adds an undefined loss");
  DUALPIPE_CHECK(loss.numel() == 1 && loss.is_floating_point(), "stage ", stage,
                 " adds a loss that is not one floating-point element, but of type ", loss.scalar_type(), " and sizes ",
                 loss.sizes());
  added_losses->push_back(loss.reshape({}));
}

Stage::Stage(std::shared_ptr<torch::nn::Module> module)
    : description_(std::make_shared<Description>(Description{.module = std::move(module)})) {}

Stage::Stage(const Stage& other)
    : description_(other.description_), owner_(other.owner_->stage < 0 ? other.owner_ : std::make_shared<Owner>()) {}

Stage& Stage::operator=(const Stage& other) { return *this = Stage(other); }

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

Stage::Description& Stage::change(const std::string& what) {
  DUALPIPE_CHECK(owner_->stage < 0, "rank ", owner_->rank, ", stage ", owner_->stage, ": ", what,
                 " after a pipeline was built of it, which would not notice; do it in the stage factory, or change a "
                 "copy and build another pipeline");
  owner_ = std::make_shared<Owner>();
  if (description_.use_count() > 1) description_ = std::make_shared<Description>(*description_);
  return *description_;
}

void Stage::add(Node node) {
  Description& own = change(detail::str("node '", node.name, "' is added"));
  node.goes_on = node.to_be_continued = false;
  for (auto before = own.nodes.rbegin(); before != own.nodes.rend() && !node.goes_on; ++before)
    if (before->layer == node.layer) before->to_be_continued = node.goes_on = true;
  own.nodes.push_back(std::move(node));
  link(own, own.nodes.size() - 1);
}

void Stage::link(Description& own, std::size_t index) {
  const Node& node = own.nodes[index];
  const Node* const before = index > 0 ? &own.nodes[index - 1] : nullptr;
  if (before != nullptr && !node.communication && !before->communication && node.recompute == before->recompute)
    own.chain.back().end = index + 1;
  else
    own.chain.push_back({index, index + 1});
}

Stage& Stage::recompute(bool recompute) {
  Description& own = change("recompute is set");
  own.chain.clear();
  for (std::size_t i = 0; i < own.nodes.size(); ++i) {
    own.nodes[i].recompute = recompute && !own.nodes[i].communication;
    link(own, i);
  }
  return *this;
}

Stage& Stage::append(const std::string& name, const Stage& next) {
  const Description theirs = *next.description_;  // `next` may be this stage
  Description& own = change(detail::str("stage '", name, "' is appended"));
  if (own.nodes.empty()) own.num_inputs = theirs.num_inputs;
  own.split = own.split && theirs.split;
  own.data_dependent_shapes = own.data_dependent_shapes || theirs.data_dependent_shapes;
  for (Node node : theirs.nodes) {
    node.name = name + "." + node.name;
    add(std::move(node));
  }
  own.used.insert(own.used.end(), theirs.used.begin(), theirs.used.end());
  for (const auto& [part, tied] : theirs.ties) tie(name + "." + part, tied);
  return *this;
}

Stage& Stage::uses(const std::vector<std::string>& parts) {
  Description& own = change("uses is set");
  DUALPIPE_CHECK(own.module != nullptr, "a stage without a module uses no parts of it; Stage(module) gives it one");
  DUALPIPE_CHECK(
      std::none_of(own.used.begin(), own.used.end(), [&](const UsedParts& used) { return used.parts == own.module; }),
      "Stage::uses was called twice; name all parts in one call");
  const auto whole = own.module;
  own.module = detail::module_parts(whole, parts);
  own.used.push_back({whole, own.module});
  return *this;
}

Stage& Stage::tie(const std::string& part, const std::string& name) {
  DUALPIPE_CHECK(!part.empty(), "Stage::tie needs the name of a parameter, a buffer or a module");
  const std::string& tied = name.empty() ? part : name;
  const auto [found, is_new] = change(detail::str("'", part, "' is tied")).ties.emplace(part, tied);
  DUALPIPE_CHECK(is_new, "'", part, "' of a stage is tied twice, as '", found->second, "' and as '", tied, "'");
  return *this;
}

Stage& Stage::split_backward(bool split) {
  change("split_backward is set").split = split;
  return *this;
}

Stage& Stage::data_dependent_shapes(bool depend) {
  change("data_dependent_shapes is set").data_dependent_shapes = depend;
  return *this;
}

Stage& Stage::layer(const std::string& name) {
  DUALPIPE_CHECK(!name.empty(), "the layer of a stage's nodes needs a name");
  for (Node& node : change("layer is set").nodes) {
    node.layer = name;
    node.goes_on = &node != &description_->nodes.front();
    node.to_be_continued = &node != &description_->nodes.back();
  }
  return *this;
}

Stage& Stage::takes(int num_inputs) {
  DUALPIPE_CHECK(num_inputs >= 0, "a stage cannot take ", num_inputs, " tensors");
  change("takes is set").num_inputs = num_inputs;
  return *this;
}

std::vector<std::string> Stage::node_names() const {
  std::vector<std::string> names;
  for (const Node& node : nodes()) names.push_back(node.name);
  return names;
}

std::string Stage::structure(bool with_loss) const {
  std::string letters;
  for (const Segment& segment : description_->chain) letters += nodes()[segment.begin].communication ? 'X' : 'C';
  const bool ends_without_graph = letters.empty() || letters.back() == 'X' || nodes().back().recompute;
  if (letters.empty() || (with_loss && ends_without_graph)) letters += 'C';
  return letters;
}

bool Stage::recomputes(int node) const {
  const auto [begin, end] = segment(node);
  return begin != end && nodes()[begin].recompute;
}

int Stage::num_nodes(bool with_loss) const { return static_cast<int>(structure(with_loss).size()); }

bool Stage::communicates() const {
  return std::any_of(nodes().begin(), nodes().end(), [](const Node& node) { return node.communication != nullptr; });
}

Stage::Segment Stage::segment(int node) const {
  return node < std::ssize(description_->chain) ? description_->chain[node] : Segment{};
}

std::string Stage::chain_name(int node) const {
  const auto [begin, end] = segment(node);
  if (begin == end) return description_->chain.empty() ? "identity" : "loss";
  const std::string& first = nodes()[begin].name;
  return end - begin == 1 ? first : first + " to " + nodes()[end - 1].name;
}

StageRun Stage::forward(Tensors inputs, StageContext context, StageLoss loss) const {
  StageRun run(*this, std::move(inputs), std::move(context), std::move(loss));
  while (!run.advanced()) run.advance();
  run.finish_forward();
  return run;
}

}  // namespace dualpipe
