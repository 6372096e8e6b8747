#pragma once

#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

// Which parts of a backward graph lead to the inputs of a stage, and which to parameters.
namespace dualpipe::detail::split {

using torch::autograd::edge_list;
using torch::autograd::Node;

/// What lies below a node, as bits.
enum Reach : std::uint8_t {
  nothing = 0,
  inputs_below = 1,      // the entrance
  parameters_below = 2,  // an accumulator
  weight_branch = 4,     // one of the node's own edges leads to parameters, and not to the entrance
};

inline bool is_weight_branch(std::uint8_t reach) {
  return (reach & (inputs_below | parameters_below)) == parameters_below;
}

/// What a node reaches through a child.
inline std::uint8_t through(std::uint8_t child) {
  return static_cast<std::uint8_t>((child & (inputs_below | parameters_below)) |
                                   (is_weight_branch(child) ? weight_branch : nothing));
}

struct Survey {
  ska::flat_hash_map<const Node*, std::uint8_t> reach;
  std::vector<Node*> input_path;  // the nodes that reach the entrance, and the entrance; children before parents
};

/// Walks the graph once. Iterative, as a graph may be deeper than the stack.
inline Survey survey(const edge_list& roots, const Node* entrance) {
  struct Visit {
    Node* node;
    std::size_t next_edge;
    std::uint8_t reach;
  };
  Survey result;
  std::vector<Visit> stack;
  for (const auto& root : roots) {
    if (!result.reach.emplace(root.function.get(), nothing).second) continue;
    stack.push_back({root.function.get(), 0, nothing});
    while (!stack.empty()) {
      Visit& visit = stack.back();
      const auto& edges = std::as_const(*visit.node).next_edges();
      if (visit.next_edge < edges.size()) {
        Node* child = edges[visit.next_edge++].function.get();
        if (child == nullptr) continue;
        const auto [found, is_new] = result.reach.emplace(child, nothing);
        if (is_new) {
          stack.push_back({child, 0, nothing});
        } else {
          visit.reach |= through(found->second);
        }
        continue;
      }
      if (edges.empty()) visit.reach = visit.node == entrance ? inputs_below : parameters_below;
      const std::uint8_t reach = visit.reach;
      result.reach[visit.node] = reach;
      if (reach & inputs_below) result.input_path.push_back(visit.node);
      stack.pop_back();
      if (!stack.empty()) stack.back().reach |= through(reach);
    }
  }
  return result;
}

/// The accumulator that a backward reaches last: that of the operation that ran first. Null where there is no other
/// operation with parameters.
inline Node* last_accumulator(const edge_list& roots) {
  Node* found = nullptr;
  auto first = std::numeric_limits<std::uint64_t>::max();
  int num_operations = 0;
  ska::flat_hash_set<const Node*> seen;
  std::vector<const Node*> stack;
  for (const auto& root : roots) stack.push_back(root.function.get());
  while (!stack.empty()) {
    const Node* const node = stack.back();
    stack.pop_back();
    if (!seen.insert(node).second) continue;
    Node* accumulator = nullptr;
    for (const auto& edge : node->next_edges()) {
      if (!edge.is_valid()) continue;
      if (std::as_const(*edge.function).next_edges().empty())
        accumulator = edge.function.get();
      else
        stack.push_back(edge.function.get());
    }
    if (accumulator == nullptr) continue;
    ++num_operations;
    if (node->sequence_nr() >= first) continue;
    first = node->sequence_nr();
    found = accumulator;
  }
  return num_operations > 1 ? found : nullptr;
}

}  // namespace dualpipe::detail::split
