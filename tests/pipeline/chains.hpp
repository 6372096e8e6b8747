#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <array>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/pipeline/group_collectives.hpp"
#include "pipeline/pipeline.hpp"

// Stages that communicate: layers as rows of nodes, cut into stages at any node. Two ranks of two pipelines form a group for
// each stage.
namespace dualpipe::test::chains {

constexpr int kExperts = 2;  // one on each rank of a group

/// What flows between nodes. In a row of dense layers, all but x are undefined.
enum Slot { x, rows, order, gate, splits, num_slots };

enum class NodeKind { attention, route, dispatch, expert, combine, merge, gather, scatter };
struct Node {
  NodeKind kind;
  int layer;
  bool communicates() const {
    return kind == NodeKind::dispatch || kind == NodeKind::combine || kind == NodeKind::gather ||
           kind == NodeKind::scatter;
  }
};
inline const char* name_of(NodeKind kind) {
  constexpr std::array names{"attention", "route", "dispatch", "expert", "combine", "merge", "gather", "scatter"};
  return names[static_cast<std::size_t>(kind)];
}

inline std::vector<Node> moe(int layer) {
  return {{NodeKind::attention, layer}, {NodeKind::route, layer},   {NodeKind::dispatch, layer},
          {NodeKind::expert, layer},    {NodeKind::combine, layer}, {NodeKind::merge, layer}};
}
inline std::vector<Node> dense(int layer) { return {{NodeKind::attention, layer}}; }
/// Two collectives in a row that double x.
inline std::vector<Node> twice(int layer) { return {{NodeKind::gather, layer}, {NodeKind::scatter, layer}}; }

/// Both ranks of a group compute the rows of both, and each gets the sum for its own.
inline std::vector<Node> shared(int layer) {
  return {{NodeKind::gather, layer}, {NodeKind::attention, layer}, {NodeKind::scatter, layer}};
}

inline std::vector<Node> row_of(std::initializer_list<std::vector<Node>> parts) {
  std::vector<Node> row;
  for (const auto& part : parts) row.insert(row.end(), part.begin(), part.end());
  return row;
}

using Stages = std::vector<std::vector<Node>>;

inline torch::Tensor attention_weight(int layer) { return seeded({kWidth, kWidth}, 300 + layer) * 0.4; }
inline torch::Tensor expert_weight(int layer, int expert) {
  return seeded({kWidth, kWidth}, 500 + 10 * layer + expert) * 0.5;
}
inline torch::Tensor chosen_expert(const torch::Tensor& input) { return (input.sum(1) > 0).to(torch::kLong); }
inline torch::Tensor merged(const Tensors& t) {
  return t[x] + t[gate] * torch::zeros_like(t[x]).index_copy(0, t[order], t[rows]);
}

/// The parameters of a stage on the rank that holds expert `expert`.
struct Weights : torch::nn::Module {
  Weights(const std::vector<Node>& nodes, int expert) {
    for (const Node& node : nodes) {
      if (node.kind == NodeKind::attention)
        register_parameter("attention" + std::to_string(node.layer), attention_weight(node.layer));
      if (node.kind == NodeKind::expert)
        register_parameter("expert" + std::to_string(node.layer), expert_weight(node.layer, expert));
    }
  }
};

inline Tensors run_node(const Node& node, const std::shared_ptr<Weights>& weights, Tensors t) {
  const auto weight = [&](const char* name) { return weights->named_parameters()[name + std::to_string(node.layer)]; };
  switch (node.kind) {
    case NodeKind::attention:
      t[x] = t[x] + torch::tanh(t[x].mm(weight("attention")));
      break;
    case NodeKind::route: {
      const auto expert = chosen_expert(t[x]);
      t[order] = torch::argsort(expert, /*stable=*/true, /*dim=*/0, /*descending=*/false);
      t[rows] = t[x].index_select(0, t[order]);
      t[gate] = torch::sigmoid(t[x].sum(1, true));
      t[splits] = torch::bincount(expert, {}, kExperts);
      break;
    }
    case NodeKind::expert:
      t[rows] = torch::tanh(t[rows].mm(weight("expert")));
      break;
    case NodeKind::merge:
      t[x] = merged(t);
      for (const int slot : {rows, order, gate, splits}) t[slot] = torch::Tensor();
      break;
    default:
      ADD_FAILURE() << "no computing node";
  }
  return t;
}

using Wrap = std::function<std::shared_ptr<Collective>(std::shared_ptr<Collective>, std::string name)>;

inline StageFactory factory_of(const Stages& stages, int expert, const std::shared_ptr<Communicator>& group,
                               const Wrap& wrap = nullptr, const std::function<void(Tensors&)>& on_compute = nullptr) {
  return [=](int number) {
    const auto& nodes = stages[static_cast<std::size_t>(number)];
    const auto weights = std::make_shared<Weights>(nodes, expert);
    Stage stage(weights);
    if (number == 0) {
      stage.takes(1);
      if (!nodes.empty() && nodes[0].communicates()) stage.takes(num_slots);
    }
    for (const Node& node : nodes) {
      const std::string name = name_of(node.kind) + std::to_string(node.layer);
      if (!node.communicates()) {
        stage.compute(name, [=](const Tensors& inputs, const StageContext&) {
          Tensors t = inputs;
          t.resize(num_slots);
          t = run_node(node, weights, std::move(t));
          if (on_compute) on_compute(t);
          return t;
        });
        continue;
      }
      std::shared_ptr<Collective> collective = node.kind == NodeKind::gather    ? all_gather(group)
                                               : node.kind == NodeKind::scatter ? reduce_scatter(group)
                                                                                : all_to_all(group);
      if (wrap) collective = wrap(std::move(collective), "stage " + std::to_string(number) + " " + name);
      const bool experts = node.kind == NodeKind::dispatch || node.kind == NodeKind::combine;
      stage.communicate(name, std::move(collective), experts ? std::vector<int>{rows, splits} : std::vector<int>{x});
    }
    return stage;
  };
}

inline LossFn moe_loss() {
  return [](const Tensors& outputs, const Tensors& targets) {
    // The last stage may end inside a layer.
    return torch::mse_loss(outputs[rows].defined() ? merged(outputs) : outputs[x], targets[0]);
  };
}

/// What one process finds in one step with all experts, for the batch of each member, weighted where it has weights.
inline std::array<Reference, kExperts> reference(const Stages& stages, const std::array<Batch, kExperts>& batches,
                                                 int num_micro_batches) {
  std::vector<std::array<std::shared_ptr<Weights>, kExperts>> weights;
  std::map<int, Tensors> experts;
  for (const auto& nodes : stages) {
    weights.push_back({std::make_shared<Weights>(nodes, 0), std::make_shared<Weights>(nodes, 1)});
    for (const Node& node : nodes)
      if (node.kind == NodeKind::expert)
        for (const auto& of_rank : weights.back())
          experts[node.layer].push_back(of_rank->named_parameters()["expert" + std::to_string(node.layer)]);
  }

  std::array<Reference, kExperts> result;
  for (int member = 0; member < kExperts; ++member) {
    for (const Batch& micro_batch : split_batch(batches[member], num_micro_batches, 0)) {
      Tensors h{micro_batch.inputs[0]};  // the member's rows; after a gather on each rank of the group
      for (std::size_t s = 0; s < stages.size(); ++s) {
        for (const Node& node : stages[s]) {
          const bool gathered = h.size() > 1;
          if (node.kind == NodeKind::gather) h.resize(kExperts, h[0]);
          if (node.kind == NodeKind::scatter) h = {h[0] + h[1]};
          if (node.kind == NodeKind::attention) {
            for (int rank = 0; rank < std::ssize(h); ++rank) {
              const auto& own = weights[s][gathered ? rank : member];
              h[rank] =
                  h[rank] + torch::tanh(h[rank].mm(own->named_parameters()["attention" + std::to_string(node.layer)]));
            }
          }
          if (node.kind != NodeKind::combine) continue;
          const Tensors& both = experts[node.layer];
          const auto second = chosen_expert(h[0]).to(torch::kBool).unsqueeze(1);
          const auto y = torch::where(second, torch::tanh(h[0].mm(both[1])), torch::tanh(h[0].mm(both[0])));
          h[0] = h[0] + torch::sigmoid(h[0].sum(1, true)) * y;
        }
      }
      const auto loss = torch::mse_loss(h[0], micro_batch.targets[0]);
      result[member].losses.push_back(loss.item<double>());
      const std::vector<double>& given = batches[member].weights;
      const double weight = given.empty() ? 1 : given[result[member].losses.size() - 1];
      const double all = given.empty() ? num_micro_batches : std::accumulate(given.begin(), given.end(), 0.0);
      if (weight > 0) (loss * (weight / all)).backward();
    }
  }
  for (std::size_t s = 0; s < stages.size(); ++s)
    for (int member = 0; member < kExperts; ++member)
      for (const auto& item : weights[s][member]->named_parameters())
        result[member].gradients[static_cast<int>(s)][item.key()] = item.value().grad();
  return result;
}

/// One of the ranks: its pipeline, one of two, and its group of two.
struct Place {
  explicit Place(const std::shared_ptr<Communicator>& world)
      : member(world->rank() % kExperts),
        pipeline(world->split(member, world->rank())),
        group(world->split(world->rank() / kExperts, world->rank())) {}
  int member;
  std::shared_ptr<Communicator> pipeline, group;
};

inline std::array<Batch, kExperts> batches_of(int num_rows) {
  return {random_batch(num_rows, 61), random_batch(num_rows, 87)};
}

constexpr double kGradientTolerance = 1e-11;

/// On each rank of `world`: two steps and an evaluation give what one process finds.
inline void expect_equals_one_process(const std::shared_ptr<Communicator>& world, const Stages& stages,
                                      const DualPipeOptions& options, const std::array<Batch, kExperts>& batches,
                                      const std::array<Reference, kExperts>& expected) {
  const Place place(world);
  DualPipe pipe(place.pipeline, options, factory_of(stages, place.member, place.group));
  const Batch& batch = batches[place.member];
  const Reference& mine = expected[place.member];
  for (int step = 1; step <= 2; ++step) {
    expect_micro_batch_losses(pipe->step(batch, moe_loss()), mine);
    expect_gradients(pipe, mine, kGradientTolerance, step);
  }
  expect_micro_batch_losses(pipe->evaluate(batch, moe_loss()), mine);
}

}  // namespace dualpipe::test::chains
