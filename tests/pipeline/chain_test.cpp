// Pipelines whose stages communicate: mixture-of-experts layers with a group of two ranks per stage, cut anywhere.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "dualpipe/pipeline/group_collectives.hpp"
#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/testing/communicators.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;

constexpr int kExperts = 2;  // one on each rank of a group
constexpr int kPipeline = 2;

// --- the model: nodes of all layers in one row, cut into stages at any place
// ------------------------------------------------------------------------------------------------------------------

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
const char* name_of(NodeKind kind) {
  constexpr std::array names{"attention", "route", "dispatch", "expert", "combine", "merge", "gather", "scatter"};
  return names[static_cast<std::size_t>(kind)];
}

std::vector<Node> moe(int layer) {
  return {{NodeKind::attention, layer}, {NodeKind::route, layer},   {NodeKind::dispatch, layer},
          {NodeKind::expert, layer},    {NodeKind::combine, layer}, {NodeKind::merge, layer}};
}
std::vector<Node> dense(int layer) { return {{NodeKind::attention, layer}}; }
/// Two collectives in a row that double x.
std::vector<Node> twice(int layer) { return {{NodeKind::gather, layer}, {NodeKind::scatter, layer}}; }

using Stages = std::vector<std::vector<Node>>;
Stages joined(std::initializer_list<std::vector<std::vector<Node>>> stages) {
  Stages result;
  for (const auto& parts : stages) {
    result.emplace_back();
    for (const auto& part : parts) result.back().insert(result.back().end(), part.begin(), part.end());
  }
  return result;
}

torch::Tensor attention_weight(int layer) { return seeded({kWidth, kWidth}, 300 + layer) * 0.4; }
torch::Tensor expert_weight(int layer, int expert) { return seeded({kWidth, kWidth}, 500 + 10 * layer + expert) * 0.5; }
torch::Tensor chosen_expert(const torch::Tensor& input) { return (input.sum(1) > 0).to(torch::kLong); }
torch::Tensor merged(const Tensors& t) {
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

Tensors run_node(const Node& node, const std::shared_ptr<Weights>& weights, Tensors t) {
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

StageFactory factory_of(const Stages& stages, int expert, const std::shared_ptr<Communicator>& group,
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

LossFn moe_loss() {
  return [](const Tensors& outputs, const Tensors& targets) {
    // The last stage may end inside a layer.
    return torch::mse_loss(outputs[rows].defined() ? merged(outputs) : outputs[x], targets[0]);
  };
}

/// Losses by member and micro-batch; gradients by member, stage and name.
struct MoeReference {
  std::array<std::vector<double>, kExperts> losses;
  std::array<std::map<int, std::map<std::string, at::Tensor>>, kExperts> gradients;
};

/// All experts in one process. A layer that is not merged when the model ends is not used unless `merged` by the loss.
MoeReference moe_reference(const Stages& stages, const std::array<Batch, kExperts>& batches, int num_micro_batches) {
  std::vector<std::array<std::shared_ptr<Weights>, kExperts>> weights;
  for (const auto& nodes : stages)
    weights.push_back({std::make_shared<Weights>(nodes, 0), std::make_shared<Weights>(nodes, 1)});
  std::map<int, std::array<torch::Tensor, kExperts>> experts;
  for (std::size_t s = 0; s < stages.size(); ++s)
    for (const Node& node : stages[s])
      if (node.kind == NodeKind::expert)
        for (int e = 0; e < kExperts; ++e)
          experts[node.layer][e] = weights[s][e]->named_parameters()["expert" + std::to_string(node.layer)];

  MoeReference result;
  for (int member = 0; member < kExperts; ++member) {
    for (const Batch& micro_batch : split_batch(batches[member], num_micro_batches, 0)) {
      torch::Tensor h = micro_batch.inputs[0];
      for (std::size_t s = 0; s < stages.size(); ++s) {
        for (const Node& node : stages[s]) {
          if (node.kind == NodeKind::attention)
            h = h + torch::tanh(h.mm(weights[s][member]->named_parameters()["attention" + std::to_string(node.layer)]));
          if (node.kind == NodeKind::gather) h = h * 2;
          if (node.kind != NodeKind::combine) continue;
          const auto second = chosen_expert(h).to(torch::kBool).unsqueeze(1);
          const auto y = torch::where(second, torch::tanh(h.mm(experts[node.layer][1])),
                                      torch::tanh(h.mm(experts[node.layer][0])));
          h = h + torch::sigmoid(h.sum(1, true)) * y;
        }
      }
      const auto loss = torch::mse_loss(h, micro_batch.targets[0]);
      result.losses[member].push_back(loss.item<double>());
      (loss / num_micro_batches).backward();
    }
  }
  for (std::size_t s = 0; s < stages.size(); ++s)
    for (int member = 0; member < kExperts; ++member)
      for (const auto& item : weights[s][member]->named_parameters())
        result.gradients[member][static_cast<int>(s)][item.key()] = item.value().grad();
  return result;
}

/// One of the four ranks: its pipeline of two and its group of two.
struct Place {
  explicit Place(const std::shared_ptr<Communicator>& world)
      : member(world->rank() % kExperts),
        pipeline(world->split(member, world->rank())),
        group(world->split(world->rank() / kExperts, world->rank())) {}
  int member;
  std::shared_ptr<Communicator> pipeline, group;
};

std::array<Batch, kExperts> batches_of(int num_rows) {
  return {random_batch(num_rows, 61), random_batch(num_rows, 87)};
}

void expect_moe_gradients(DualPipe& pipe, const MoeReference& expected, int member, double factor = 1) {
  for (const auto& child : pipe->named_children()) {
    const int stage = std::stoi(child.key().substr(5));
    for (const auto& item : child.value()->named_parameters()) {
      at::Tensor truth = expected.gradients[member].at(stage).at(item.key());
      if (truth.defined()) truth = truth * factor;
      EXPECT_LE(difference(item.value().grad(), truth), 1e-11) << child.key() << "." << item.key();
    }
  }
}

enum class Network { direct, serial, delayed };
std::shared_ptr<Communicator> over(Network network, std::shared_ptr<Communicator> inner) {
  if (network == Network::serial) return testing::serial(std::move(inner));
  if (network == Network::delayed)
    return testing::delayed_links(std::move(inner), {std::chrono::microseconds(500), 1e8});
  return inner;
}

void expect_equals_one_process(const Stages& stages, const std::string& kind, int num_micro_batches, Network network,
                               Publish publish) {
  const auto batches = batches_of(4 * num_micro_batches);
  const MoeReference expected = moe_reference(stages, batches, num_micro_batches);
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(over(network, world));
    DualPipe pipe(place.pipeline,
                  DualPipeOptions{.num_micro_batches = num_micro_batches, .schedule = kind, .publish = publish},
                  factory_of(stages, place.member, place.group));
    const Batch& batch = batches[static_cast<std::size_t>(place.member)];
    for (int step = 1; step <= 2; ++step) {
      const StepResult result = pipe->step(batch, moe_loss());
      const auto losses = result.micro_batch_losses();
      for (int m = 0; m < num_micro_batches; ++m)
        EXPECT_NEAR(losses[m], expected.losses[place.member][m], 1e-12) << "micro-batch " << m;
      expect_moe_gradients(pipe, expected, place.member, step);
    }
    const auto losses = pipe->evaluate(batch, moe_loss()).micro_batch_losses();
    for (int m = 0; m < num_micro_batches; ++m) EXPECT_NEAR(losses[m], expected.losses[place.member][m], 1e-12);
  });
}

// --- gradients
// -------------------------------------------------------------------------------------------------------------------

using Case = std::tuple<std::string, Network, Publish>;
class ChainGradients : public ::testing::TestWithParam<Case> {};

TEST_P(ChainGradients, LayersWithExpertsAndWithout) {
  const auto& [kind, network, publish] = GetParam();
  const int num_micro_batches = 6;
  const int num_stages = make_schedule({kind, kPipeline, num_micro_batches}).num_stages;
  for (const int variant : {0, 1, 2}) {
    SCOPED_TRACE("variant " + std::to_string(variant));
    Stages stages;
    for (int s = 0; s < num_stages; ++s) {
      // All with experts; every second one dense; two layers with collectives in a row between.
      if (variant == 2)
        stages.push_back(joined({{moe(2 * s), twice(2 * s), moe(2 * s + 1)}})[0]);
      else
        stages.push_back(variant == 1 && s % 2 == 1 ? dense(s) : moe(s));
    }
    expect_equals_one_process(stages, kind, num_micro_batches, network, publish);
  }
}

std::string case_name(const ::testing::TestParamInfo<Case>& info) {
  const auto& [kind, network, publish] = info.param;
  const std::string networks[] = {"direct", "serial", "delayed"};
  return "schedule_" + kind + "_" + networks[static_cast<int>(network)] +
         (publish == Publish::early ? "_early" : "_atomic");
}

INSTANTIATE_TEST_SUITE_P(Chain, ChainGradients,
                         ::testing::Values(Case{"dualpipe", Network::direct, Publish::early},
                                           Case{"dualpipe", Network::direct, Publish::atomic},
                                           Case{"dualpipe", Network::serial, Publish::early},
                                           Case{"dualpipe", Network::delayed, Publish::early},
                                           Case{"dualpipev", Network::direct, Publish::early},
                                           Case{"dualpipev", Network::serial, Publish::early},
                                           Case{"dualpipev", Network::delayed, Publish::early},
                                           Case{"1f1b", Network::delayed, Publish::early},
                                           Case{"zb1p", Network::direct, Publish::early},
                                           Case{"zbv", Network::delayed, Publish::atomic}),
                         case_name);

TEST(Chain, StagesCutAtAnyNode) {
  const unsigned seed = 99;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 12; ++round) {
    const std::string kind = round % 2 == 0 ? "dualpipe" : "dualpipev";
    const auto num_stages = static_cast<std::size_t>(round % 2 == 0 ? 2 : 4);
    std::vector<Node> row = joined({{dense(0), moe(1), twice(2), moe(3), dense(4)}})[0];
    // From 1 to 7 nodes in each stage.
    std::vector<std::size_t> cuts{0, row.size()};
    bool fits = false;
    while (!fits) {
      cuts.resize(2);
      while (cuts.size() < num_stages + 1) cuts.push_back(1 + random() % (row.size() - 1));
      std::sort(cuts.begin(), cuts.end());
      fits = true;
      for (std::size_t s = 0; s < num_stages; ++s) {
        const std::size_t length = cuts[s + 1] - cuts[s];
        fits = fits && length >= 1 && length <= (num_stages == 2 ? 9U : 7U);
      }
    }
    Stages stages;
    std::string text;
    for (std::size_t s = 0; s < num_stages; ++s) {
      stages.emplace_back(row.begin() + static_cast<std::ptrdiff_t>(cuts[s]),
                          row.begin() + static_cast<std::ptrdiff_t>(cuts[s + 1]));
      text += " " + std::to_string(cuts[s + 1] - cuts[s]);
    }
    SCOPED_TRACE(kind + " with stages of" + text + " nodes");
    expect_equals_one_process(stages, kind, 6, round % 3 == 0 ? Network::delayed : Network::direct, Publish::early);
  }
}

TEST(Chain, TheModelMayEndInACollective) {
  std::vector<Node> last = moe(1);
  last.pop_back();  // merged by the loss
  expect_equals_one_process({moe(0), last}, "dualpipe", 6, Network::delayed, Publish::early);
  expect_equals_one_process({moe(0), last}, "1f1b", 5, Network::direct, Publish::early);
}

// --- order and memory
// ---------------------------------------------------------------------------------------------------------------------

class Logged final : public Collective {
 public:
  Logged(std::shared_ptr<Collective> inner, std::string name, std::vector<std::string>& log)
      : inner_(std::move(inner)), name_(std::move(name)), log_(log) {}
  Launched forward(Tensors inputs, const StageContext& context) override {
    const std::string name = name_ + " micro-batch " + std::to_string(context.micro_batch);
    log_.push_back(name + " F");
    Launched launched = inner_->forward(std::move(inputs), context);
    launched.handle = std::make_shared<Handle>(Handle{std::move(launched.handle), name});
    return launched;
  }
  Pending backward(std::shared_ptr<void> handle, Tensors gradients) override {
    const auto mine = std::static_pointer_cast<Handle>(std::move(handle));
    log_.push_back(mine->name + " B");
    return inner_->backward(mine->inner, std::move(gradients));
  }

 private:
  struct Handle {
    std::shared_ptr<void> inner;
    std::string name;
  };
  std::shared_ptr<Collective> inner_;
  std::string name_;
  std::vector<std::string>& log_;
};

TEST(Chain, MembersOfAGroupLaunchCollectivesInOneOrderWhateverTheyTake) {
  const int num_micro_batches = 8;
  const auto batches = batches_of(4 * num_micro_batches);
  std::array<std::vector<std::string>, kExperts * kPipeline> logs;
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(over(Network::delayed, world));
    auto& log = logs[static_cast<std::size_t>(world->rank())];
    DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = num_micro_batches},
                  factory_of(
                      {moe(0), joined({{moe(1), moe(2)}})[0]}, place.member, place.group,
                      [&log](std::shared_ptr<Collective> inner, std::string name) {
                        return std::make_shared<Logged>(std::move(inner), std::move(name), log);
                      },
                      [&](Tensors&) {
                        if (place.member == 1) std::this_thread::sleep_for(std::chrono::microseconds(300));
                      }));
    pipe->step(batches[static_cast<std::size_t>(place.member)], moe_loss());
  });
  for (int rank = 0; rank < kPipeline; ++rank) {
    EXPECT_FALSE(logs[kExperts * rank].empty());
    EXPECT_EQ(logs[kExperts * rank], logs[kExperts * rank + 1]);
  }
}

int resident_pages() {
  int size = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> size >> resident;
  return resident;
}

TEST(Chain, LiveActivationsAreThoseOfTheScheduleAndMemoryStaysFlat) {
  for (const int num_micro_batches : {4, 12}) {
    const auto batches = batches_of(4 * num_micro_batches);
    std::atomic<int> after_warm_up{0};
    run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
      const Place place(world);
      // The first node of each chain leaves a token in its graph; tokens alive are activations alive.
      std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> tokens;
      std::size_t peak = 0;
      const auto alive = [&] {
        std::erase_if(tokens, [](const auto& token) { return token.expired(); });
        return tokens.size();
      };
      DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = num_micro_batches},
                    factory_of({moe(0), moe(1)}, place.member, place.group, nullptr, [&](Tensors& t) {
                      if (t[rows].defined() || t[order].defined()) return;  // only after attention ...
                      if (!t[x].requires_grad()) return;
                      const auto token = torch::rand_like(t[x]);
                      tokens.emplace_back(
                          c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(token.storage().unsafeGetStorageImpl()));
                      t[x] = t[x] * token;  // ... which keeps it for its backward
                      peak = std::max(peak, alive());
                    }));
      const int num_steps = num_micro_batches == 4 ? 100 : 2;
      for (int step = 0; step < num_steps; ++step) {
        pipe->step(batches[static_cast<std::size_t>(place.member)], moe_loss());
        EXPECT_EQ(alive(), 0U);
        if (step == 20) {
          world->barrier().wait();
          if (world->rank() == 0) after_warm_up = resident_pages();
        }
      }
      world->barrier().wait();
      if (world->rank() == 0 && after_warm_up > 0) {
        EXPECT_LT(resident_pages(), after_warm_up + 512) << "pages of 4 KiB";
      }
      // Twice, since merge is seen too: attention and merge of a stage leave one token each.
      EXPECT_LE(peak, 2U * (kPipeline + 1));
      EXPECT_GE(peak, 2U * kPipeline);
    });
  }
}

TEST(Chain, TheTracerSeesCollectivesAndNodes) {
  const int num_micro_batches = 6;
  const auto batches = batches_of(4 * num_micro_batches);
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(over(Network::delayed, world));
    DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = num_micro_batches},
                  factory_of({moe(0), dense(1)}, place.member, place.group));
    auto tracer = std::make_shared<Tracer>(place.pipeline->rank());
    pipe->add_observer(tracer);
    pipe->step(batches[static_cast<std::size_t>(place.member)], moe_loss());
    std::map<std::string, int> collectives, nodes;
    std::vector<Interval> steps;
    for (const Interval& interval : tracer->last().intervals) {
      EXPECT_LE(interval.begin, interval.end);
      if (interval.lane == Lane::collective) ++collectives[interval.node + static_cast<char>(interval.step.op.pass)];
      if (interval.lane == Lane::node) ++nodes[interval.node + static_cast<char>(interval.step.op.pass)];
      if (interval.lane == Lane::compute) steps.push_back(interval);
    }
    // Half of the micro-batches run stage 0 here. Backwards are B or I, as the schedule has them.
    const int half = num_micro_batches / 2;
    EXPECT_EQ(collectives["dispatch0F"], half);
    EXPECT_EQ(collectives["combine0F"], half);
    EXPECT_EQ(collectives["dispatch0B"] + collectives["dispatch0I"], half);
    EXPECT_EQ(collectives["combine0B"] + collectives["combine0I"], half);
    EXPECT_EQ(nodes["expert0F"], half);
    EXPECT_EQ(nodes["merge0F"], half);
    EXPECT_EQ(nodes["attention0 to route0F"], half);
    EXPECT_EQ(nodes["expert0I"], half);
    // Steps follow each other, and each node lies in one.
    for (std::size_t i = 1; i < steps.size(); ++i) EXPECT_LE(steps[i - 1].end, steps[i].begin);
    for (const Interval& interval : tracer->last().intervals) {
      if (interval.lane != Lane::node) continue;
      EXPECT_TRUE(std::any_of(steps.begin(), steps.end(), [&](const Interval& step) {
        return step.begin <= interval.begin && interval.end <= step.end;
      }));
    }
  });
}

// --- failures
// ---------------------------------------------------------------------------------------------------------------------

struct Bomb final : Collective {
  Bomb(std::shared_ptr<Collective> inner, std::string where, int micro_batch)
      : inner_(std::move(inner)), where_(std::move(where)), micro_batch_(micro_batch) {}
  Launched forward(Tensors inputs, const StageContext& context) override {
    armed_ = context.micro_batch == micro_batch_;
    if (armed_ && where_ == "forward") throw std::runtime_error("boom in forward");
    Launched launched = inner_->forward(std::move(inputs), context);
    if (armed_ && where_ == "take")
      launched.pending =
          join({launched.pending}, [](std::vector<Tensors>) -> Tensors { throw std::runtime_error("boom in take"); });
    return launched;
  }
  Pending backward(std::shared_ptr<void> handle, Tensors gradients) override {
    if (where_ == "backward") throw std::runtime_error("boom in backward");
    return inner_->backward(std::move(handle), std::move(gradients));
  }
  std::shared_ptr<Collective> inner_;
  std::string where_;
  int micro_batch_;
  bool armed_ = false;
};

/// What each rank's step throws.
std::vector<std::string> messages_of(const Stages& stages, const std::function<Wrap(int world_rank)>& wrap,
                                     const std::function<void(int, Tensors&)>& on_compute = nullptr) {
  std::vector<std::string> messages(kExperts * kPipeline);
  std::mutex mutex;
  const auto batches = batches_of(24);
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(world);
    DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = 6},
                  factory_of(stages, place.member, place.group, wrap ? wrap(world->rank()) : nullptr, [&](Tensors& t) {
                    if (on_compute) on_compute(world->rank(), t);
                  }));
    const std::string message = message_of([&] {
      world->barrier().wait();  // a failure is not to meet another rank's constructor
      pipe->step(batches[static_cast<std::size_t>(place.member)], moe_loss());
    });
    for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
    const std::lock_guard lock(mutex);
    messages[static_cast<std::size_t>(world->rank())] = message;
  });
  return messages;
}

TEST(Chain, ACollectiveThatThrowsEndsTheStepOnAllRanks) {
  for (const std::string where : {"forward", "take", "backward"}) {
    const auto messages = messages_of({moe(0), moe(1)}, [&](int world_rank) -> Wrap {
      return [&where, world_rank](std::shared_ptr<Collective> inner, const std::string& name) {
        return world_rank == 3 && name == "stage 1 dispatch1" ? std::make_shared<Bomb>(std::move(inner), where, 1)
                                                              : std::move(inner);
      };
    });
    const std::string pass = where == "backward" ? "backward" : "forward";
    EXPECT_THAT(messages, Each(AllOf(HasSubstr("boom in " + where), HasSubstr("rank 3: " + pass + " of stage 1, "),
                                     HasSubstr(", node dispatch1, micro-batch "))));
  }
}

TEST(Chain, SplitsThatDoNotAddUpNameStageNodeAndRankOnAllRanks) {
  const auto messages = messages_of({moe(0), moe(1)}, nullptr, [](int rank, Tensors& t) {
    if (rank == 0 && t[splits].defined() && t[splits].dim() == 1) t[splits] = t[splits] + 1;
  });
  EXPECT_THAT(messages, Each(AllOf(HasSubstr("add up to 6 rows, but tensor 0 is [float64 [4, 6]"),
                                   HasSubstr("rank 0: forward of stage 0, node dispatch0, micro-batch "))));
}

TEST(Chain, RanksThatDisagreeAboutSplitsAllFail) {
  // Member 1 sends back other rows than came.
  const auto messages = messages_of({moe(0), moe(1)}, nullptr, [](int rank, Tensors& t) {
    if (rank == 1 && t[splits].defined() && t[splits].dim() == 2) t[splits] = t[splits].flip(1);
  });
  EXPECT_THAT(messages, Each(AllOf(HasSubstr(" of stage "), HasSubstr(", node combine"), HasSubstr("expects by its"))));
}

TEST(Chain, RanksThatLaunchDifferentCollectivesAllFail) {
  const auto messages = messages_of({moe(0), moe(1)}, [](int world_rank) -> Wrap {
    return [world_rank](std::shared_ptr<Collective> inner, const std::string&) -> std::shared_ptr<Collective> {
      struct Two final : Collective {
        explicit Two(std::shared_ptr<Collective> c) : collective(std::move(c)) {}
        Launched forward(Tensors inputs, const StageContext& context) override {
          inputs.insert(inputs.begin(), torch::ones_like(inputs[0]));
          return collective->forward(std::move(inputs), context);
        }
        Pending backward(std::shared_ptr<void> handle, Tensors gradients) override {
          return collective->backward(std::move(handle), std::move(gradients));
        }
        std::shared_ptr<Collective> collective;
      };
      if (world_rank == 2) return std::make_shared<Two>(std::move(inner));
      return inner;
    };
  });
  for (const std::string& message : messages) EXPECT_THAT(message, HasSubstr("stage "));
}

TEST(Chain, WhatCannotTravelNamesTheStageThatReturnedIt) {
  for (const Publish publish : {Publish::early, Publish::atomic}) {
    std::atomic<int> named{0};
    run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
      const std::string message = message_of([&] {
        DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 2, .schedule = "1f1b", .publish = publish}, [](int) {
          return Stage().compute("sparse",
                                 [](const Tensors& x, const StageContext&) { return Tensors{x[0].to_sparse()}; });
        });
        pipe->step(random_batch(4, 1), squared_error());
      });
      if (message.find("outputs of stage 0 for micro-batch 0: tensor 0 of the message has layout Sparse") !=
          std::string::npos)
        ++named;
    });
    EXPECT_EQ(named, 2);
  }
}

TEST(Chain, StagesChangedAfterConstructionAreRefused) {
  const auto batches = batches_of(24);
  const MoeReference expected = moe_reference({moe(0), moe(1)}, batches, 6);
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(world);
    std::map<int, Stage> mine;
    const StageFactory inner = factory_of({moe(0), moe(1)}, place.member, place.group);
    const auto factory = [&](int number) { return mine.try_emplace(number, inner(number)).first->second; };
    DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = 6}, factory);
    const Compute late = [](const Tensors&, const StageContext&) -> Tensors { throw std::runtime_error("late"); };
    for (auto& [number, stage] : mine) {
      const std::string where = detail::str("rank ", world->rank(), ", stage ", number, ": ");
      EXPECT_THAT(message_of([&, &own = stage] { own.compute("late", late); }),
                  AllOf(HasSubstr(where), HasSubstr("node 'late' is added after")));
      EXPECT_THAT(message_of([&, &own = stage] { own.append("more", Stage().compute("late", late)); }),
                  HasSubstr(where));
      EXPECT_THAT(message_of([&, &own = stage] { own.split_backward(false); }), HasSubstr(where));
      EXPECT_THAT(message_of([&, &own = stage] { own.takes(7); }), HasSubstr(where));
      Stage copy = stage;
      copy.compute("late", late);
      EXPECT_EQ(copy.node_names().size(), stage.node_names().size() + 1);
    }
    pipe->step(batches[static_cast<std::size_t>(place.member)], moe_loss());
    expect_moe_gradients(pipe, expected, place.member);
  });
}

}  // namespace
}  // namespace dualpipe::test
