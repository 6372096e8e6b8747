#pragma once

#include "dualpipe/detail/stage/split_backward.hpp"

#include <ATen/ops/zeros.h>
#include <c10/core/AutogradState.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>

#include "dualpipe/detail/stage/graph_survey.hpp"
#include "dualpipe/detail/stage/shared_memory.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace split {

namespace autograd = torch::autograd;
using autograd::variable_list;

/// The last node of every backward: keeps the gradients of the graph's inputs, input i in slot i.
class Entrance final : public Node {
 public:
  variable_list take() { return std::exchange(gradients_, {}); }

 protected:
  variable_list apply(variable_list&& gradients) override {
    gradients_ = std::move(gradients);
    return {};
  }

 private:
  variable_list gradients_;
};

template <class T, class Pointer = NodePtr, class... Arguments>
Pointer make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::make_shared<T>(std::forward<Arguments>(arguments)...);
  } else {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  }
}

/// Keeps the gradients that an operation's backward receives, behind all hooks that may change them.
class Capture final : public autograd::FunctionPreHook {
 public:
  variable_list operator()(const variable_list& gradients) override {
    gradients_ = gradients;
    return gradients;
  }
  variable_list take() { return std::move(gradients_); }

 private:
  variable_list gradients_;
};

/// Keeps the engine from handing work to the device threads that all ranks of a process share.
class CallingThreadOnly {
 public:
  CallingThreadOnly() : before_(c10::AutogradState::get_tls_state().get_multithreading_enabled()) { set(false); }
  ~CallingThreadOnly() { set(before_); }
  CallingThreadOnly(const CallingThreadOnly&) = delete;
  CallingThreadOnly& operator=(const CallingThreadOnly&) = delete;

 private:
  static void set(bool enabled) { c10::AutogradState::get_tls_state().set_multithreading_enabled(enabled); }
  bool before_;
};

inline void run_engine(const edge_list& roots, const variable_list& gradients, bool keep_graph) {
  if (roots.empty()) return;
  const CallingThreadOnly guard;
  // A backward computes in the dtypes that its forward has chosen, also where autocast is on around the whole step.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  autograd::Engine::get_default_engine().execute(roots, gradients, keep_graph, /*create_graph=*/false,
                                                 /*accumulate_grad=*/true);
}

/// Gives an operation other edges. A write into a view runs a node of its own inside, whose edges the engine wants to
/// be the same except for the first, which leads on from the view instead of from the whole tensor.
inline void set_edges(Node& node, edge_list edges) {
  if (auto* write = dynamic_cast<autograd::CopySlices*>(&node); write != nullptr && write->fn) {
    std::copy(edges.begin() + 1, edges.end(), write->fn->next_edges().begin() + 1);
  }
  node.next_edges() = std::move(edges);
}

/// An operation with a part in both halves of the backward.
struct Boundary {
  edge_list weight_edges;  // its edges that only lead to parameters, the others invalid; as many as it has
  Capture* capture;        // owned by the node
};

/// Moves the edges to parameters aside, so that the engine neither follows them nor has their gradients computed.
inline Boundary detach_weight_branches(Node& node, const Survey& survey) {
  edge_list input_edges = node.next_edges();
  edge_list weight_edges(input_edges.size());
  for (std::size_t i = 0; i < input_edges.size(); ++i) {
    if (input_edges[i].is_valid() && is_weight_branch(survey.reach.at(input_edges[i].function.get()))) {
      std::swap(input_edges[i], weight_edges[i]);
    }
  }
  set_edges(node, std::move(input_edges));
  auto capture = std::make_unique<Capture>();
  Boundary boundary{std::move(weight_edges), capture.get()};
  node.add_pre_hook(std::move(capture));
  return boundary;
}

/// The hooks have seen this gradient, and what was captured is what they made of it.
inline void clear_hooks(Node& node) {
  node.tensor_pre_hooks().clear();
  node.retains_grad_hooks().clear();
  node.pre_hooks().clear();
}

/// Copies each input gradient whose memory a parameter's gradient has taken over. Accumulation adopts the gradient that
/// arrives first instead of copying it, and that may be a view of one that also reached an input: x +
/// bias.unsqueeze(0).
inline void copy_adopted(Tensors& input_gradients, const Tensors& output_gradients) {
  for (auto& gradient : input_gradients) {
    const auto* storage = storage_of(gradient);
    if (storage == nullptr) continue;
    std::vector<const c10::TensorImpl*> known;
    for (const auto* tensors : {&std::as_const(input_gradients), &output_gradients}) {
      for (const auto& tensor : *tensors) {
        if (storage_of(tensor) == storage) known.push_back(tensor.unsafeGetTensorImpl());
      }
    }
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    if (gradient.storage().use_count() > known.size()) gradient = gradient.clone();
  }
}

/// The same where the weight part, and with it the adoption, is still to come.
inline void copy_adoptable(Tensors& input_gradients, const variable_list& deferred) {
  for (auto& gradient : input_gradients) {
    if (std::any_of(deferred.begin(), deferred.end(),
                    [&](const auto& other) { return share_storage(gradient, other); })) {
      gradient = gradient.clone();
    }
  }
}

}  // namespace split

GraphInputs enter_graph(const Tensors& inputs) {
  GraphInputs result;
  result.tensors.reserve(inputs.size());
  const bool grad_mode = c10::GradMode::is_enabled();
  for (const auto& input : inputs) {
    // detach() gives a tensor object of our own: no history that user code makes ends up in the caller's.
    result.tensors.push_back(input.defined() ? input.detach() : input);
    const bool differentiable = grad_mode && input.defined() && input.requires_grad();
    if (differentiable && !result.entrance) result.entrance = split::make_node<split::Entrance>();
  }
  if (!result.entrance) return result;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const auto& tensor = result.tensors[i];
    if (inputs[i].defined() && inputs[i].requires_grad()) {
      torch::autograd::impl::set_gradient_edge(tensor, {result.entrance, result.entrance->add_input_metadata(tensor)});
    } else {
      result.entrance->add_input_metadata(torch::autograd::Node::undefined_input());  // keeps slot i for input i
    }
  }
  return result;
}

BackwardGraph::BackwardGraph(const GraphInputs& inputs, const Tensors& outputs)
    : entrance_(inputs.entrance), num_inputs_(inputs.entrance ? inputs.entrance->num_inputs() : inputs.tensors.size()) {
  DUALPIPE_CHECK(!entrance_ || dynamic_cast<split::Entrance*>(entrance_.get()) != nullptr,
                 "a graph's entrance must come from enter_graph, got ", entrance_->name());
  outputs_.reserve(outputs.size());
  for (const auto& output : outputs) {
    outputs_.push_back(output.defined() && output.requires_grad() ? torch::autograd::impl::gradient_edge(output)
                                                                  : torch::autograd::Edge());
  }
}

BackwardGraph::Roots BackwardGraph::start(const char* what, const Tensors& output_gradients) {
  if (state_ != State::Ready) {
    throw Error(str(what, " called again: the backward of this micro-batch has run before"));
  }
  DUALPIPE_CHECK(output_gradients.size() == outputs_.size(), what, " takes one gradient per output: ", outputs_.size(),
                 " outputs, got ", output_gradients.size(), " gradients");
  state_ = State::Done;
  Roots roots;
  torch::autograd::edge_list outputs = std::exchange(outputs_, {});
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].is_valid() || !output_gradients[i].defined()) continue;
    roots.edges.push_back(std::move(outputs[i]));
    roots.gradients.push_back(output_gradients[i]);
  }
  return roots;
}

Tensors BackwardGraph::leaves() const {
  Tensors found;
  ska::flat_hash_set<const torch::autograd::Node*> seen;
  std::vector<const torch::autograd::Node*> stack;
  for (const auto& edge : outputs_) stack.push_back(edge.function.get());
  while (!stack.empty()) {
    const torch::autograd::Node* const node = stack.back();
    stack.pop_back();
    if (node == nullptr || !seen.insert(node).second) continue;
    if (const auto* accumulator = dynamic_cast<const torch::autograd::AccumulateGrad*>(node))
      found.push_back(accumulator->variable);
    for (const auto& edge : node->next_edges()) stack.push_back(edge.function.get());
  }
  return found;
}

Tensors BackwardGraph::backward(const Tensors& output_gradients) {
  Roots roots = start("backward", output_gradients);
  const NodePtr entrance = std::exchange(entrance_, nullptr);
  split::run_engine(roots.edges, roots.gradients, /*keep_graph=*/false);
  Tensors result = entrance ? static_cast<split::Entrance&>(*entrance).take() : Tensors();
  result.resize(num_inputs_);
  roots = {};
  split::copy_adopted(result, output_gradients);
  return result;
}

/// Runs what leads to `entrance`, and frees what only that needed.
///
/// @return where the rest begins.
BackwardGraph::Roots BackwardGraph::run_input_part(Roots roots, torch::autograd::Node* entrance,
                                                   const BackwardOwner* owner) {
  const split::Survey found = split::survey(roots.edges, entrance);
  Roots input_roots;
  Roots weight_roots;
  for (std::size_t i = 0; i < roots.edges.size(); ++i) {
    Roots& part = found.reach.at(roots.edges[i].function.get()) & split::inputs_below ? input_roots : weight_roots;
    part.edges.push_back(std::move(roots.edges[i]));
    part.gradients.push_back(std::move(roots.gradients[i]));
  }
  std::vector<split::Boundary> boundaries;
  for (torch::autograd::Node* node : found.input_path) {
    if (!(found.reach.at(node) & split::weight_branch)) continue;
    boundaries.push_back(split::detach_weight_branches(*node, found));
    if (owner != nullptr && owner->module != nullptr && StateWatch::may_write(*node)) StateWatch::put(*node, *owner);
  }

  split::run_engine(input_roots.edges, input_roots.gradients, /*keep_graph=*/true);

  // Children first: a node that loses its last owner here has been dealt with before. Where gradients of several
  // operations are summed, the engine adds them in the order of the operations, which is the same for a whole backward
  // and for its parts.
  auto boundary = boundaries.begin();
  for (torch::autograd::Node* node : found.input_path) {
    if (!(found.reach.at(node) & split::weight_branch)) {
      node->release_variables();
      std::fill(node->next_edges().begin(), node->next_edges().end(), torch::autograd::Edge());
      continue;
    }
    const torch::autograd::variable_list gradients = boundary->capture->take();
    split::clear_hooks(*node);
    StateWatch::remove(*node);
    split::set_edges(*node, std::move(boundary->weight_edges));
    ++boundary;
    bool any = false;
    for (std::size_t slot = 0; slot < gradients.size(); ++slot) {
      if (!gradients[slot].defined()) continue;
      weight_roots.edges.emplace_back(node->getptr(), static_cast<std::uint32_t>(slot));
      weight_roots.gradients.push_back(gradients[slot]);
      any = true;
    }
    if (!any) {
      // Nothing flowed in, yet something may come out: custom functions see zeros. The engine takes no undefined
      // gradient at a root, so one node more passes it on.
      const at::Tensor unused = at::zeros({});
      const NodePtr relay =
          split::make_node<torch::autograd::UndefinedGradBackward>(torch::autograd::edge_list{{node->getptr(), 0}});
      weight_roots.edges.emplace_back(relay, relay->add_input_metadata(unused));
      weight_roots.gradients.push_back(unused);
    }
  }
  return weight_roots;
}

Tensors BackwardGraph::backward_input(const Tensors& output_gradients, const BackwardOwner* owner) {
  Roots roots = start("backward_input", output_gradients);
  const NodePtr entrance = std::exchange(entrance_, nullptr);
  Tensors result;
  if (entrance) {
    roots = run_input_part(std::move(roots), entrance.get(), owner);
    result = static_cast<split::Entrance&>(*entrance).take();
    split::copy_adoptable(result, roots.gradients);
  }
  result.resize(num_inputs_);
  deferred_.push_back(std::move(roots));
  state_ = entrance ? State::Weights : State::AllIsWeights;
  return result;
}

void BackwardGraph::require_weights() const {
  if (state_ == State::Ready) throw Error("backward_weight called before backward_input");
  if (state_ == State::Done) throw Error("backward_weight called again, or after a backward that left nothing for it");
}

void BackwardGraph::backward_weight() {
  require_weights();
  state_ = State::Done;
  std::vector<Roots> parts = std::exchange(deferred_, {});
  for (; !parts.empty(); parts.pop_back())
    split::run_engine(parts.back().edges, parts.back().gradients, /*keep_graph=*/false);
}

bool BackwardGraph::backward_weight_part(const BackwardOwner* owner) {
  require_weights();
  const State before = std::exchange(state_, State::Done);  // also where something throws
  std::vector<Roots> parts = std::exchange(deferred_, {});
  // What the input part would be if the first layer's parameters were inputs.
  torch::autograd::Node* const stand_in =
      before == State::AllIsWeights ? split::last_accumulator(parts.back().edges) : nullptr;
  if (stand_in != nullptr) {
    parts = independent(run_input_part(std::move(parts.back()), stand_in, owner));
  } else {
    if (before != State::WeightParts) parts = independent(std::move(parts.back()));
    if (!parts.empty()) {
      split::run_engine(parts.back().edges, parts.back().gradients, /*keep_graph=*/false);
      parts.pop_back();
    }
  }
  if (parts.empty()) return false;
  deferred_ = std::move(parts);
  state_ = State::WeightParts;
  return true;
}

/// Divides where a backward begins so that no operation is behind two of the parts.
std::vector<BackwardGraph::Roots> BackwardGraph::independent(Roots roots) {
  std::vector<std::size_t> leader(roots.edges.size());
  std::iota(leader.begin(), leader.end(), std::size_t{0});
  const auto leader_of = [&](std::size_t root) {
    while (leader[root] != root) root = leader[root] = leader[leader[root]];
    return root;
  };
  ska::flat_hash_map<const torch::autograd::Node*, std::size_t> owners;
  for (std::size_t root = 0; root < roots.edges.size(); ++root) {
    std::vector<const torch::autograd::Node*> stack{roots.edges[root].function.get()};
    while (!stack.empty()) {
      const torch::autograd::Node* const node = stack.back();
      stack.pop_back();
      if (node == nullptr) continue;
      const auto [owner, is_new] = owners.emplace(node, root);
      if (!is_new) {
        leader[leader_of(root)] = leader_of(owner->second);
        continue;
      }
      for (const auto& edge : node->next_edges()) stack.push_back(edge.function.get());
    }
  }
  std::vector<Roots> parts;
  ska::flat_hash_map<std::size_t, std::size_t> part_of;
  for (std::size_t root = 0; root < roots.edges.size(); ++root) {
    const auto [part, is_new] = part_of.emplace(leader_of(root), parts.size());
    if (is_new) parts.emplace_back();
    parts[part->second].edges.push_back(std::move(roots.edges[root]));
    parts[part->second].gradients.push_back(std::move(roots.gradients[root]));
  }
  return parts;
}

}  // namespace dualpipe::detail
