// Chains of computing nodes and collectives over a group of ranks, alone and in pairs, against one process that holds
// the tensors of all ranks in one autograd graph.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <random>
#include <string>

#include "dualpipe/comm/local.hpp"
#include "dualpipe/pipeline/group_collectives.hpp"
#include "dualpipe/pipeline/pair.hpp"
#include "pipeline/collective_wrappers.hpp"
#include "pipeline/network.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using torch::Tensor;

constexpr int kGroup = 2;
constexpr int kWeights = 3;

StageContext context(int micro_batch, bool training = true) { return {1, micro_batch, 0, training}; }

// --- the chains
// --------------------------------------------------------------------------------------------------------------

/// What flows: rows that collectives move, a residual that passes by, numbers of the rows, splits, nothing.
enum Slot { rows, residual, ids, splits, nothing, num_slots };

enum class Kind { compute, exchange, gather, scatter };
struct Spec {
  std::vector<Kind> kinds;
  std::vector<int> weights;  // of a computing node
  std::string structure() const {
    std::string text;
    for (const Kind kind : kinds) text += kind == Kind::compute ? 'C' : 'X';
    return text;
  }
};

/// Rows that a node leaves on a rank: what the next collective can take. Ranks have different numbers.
std::int64_t rows_after(const Spec& spec, std::size_t node, int rank) {
  if (node + 1 < spec.kinds.size() && spec.kinds[node + 1] == Kind::scatter) return 6;
  return 4 + 2 * rank + 2 * static_cast<std::int64_t>(node % 3);
}
Tensor splits_for(std::int64_t num_rows, std::size_t node, int rank) {
  const std::int64_t away = static_cast<std::int64_t>(3 * node + 2 * static_cast<std::size_t>(rank)) % num_rows;
  std::vector<std::int64_t> counts(kGroup, 0);
  counts[1 - rank] = away;
  counts[rank] = num_rows - away;
  return torch::tensor(counts, torch::kLong);
}

/// A computing node of a rank: rows through a weight, to another number of them, and into the residual.
Tensors compute_node(const Spec& spec, std::size_t node, int rank, const Tensor& weight, const Tensors& x) {
  const std::int64_t count = rows_after(spec, node, rank);
  const Tensor index = torch::arange(count).remainder(x[rows].size(0));
  const Tensor h = torch::tanh(x[rows].mm(weight)).index_select(0, index);
  const Tensor weighted = h * (1 + 0.1 * x[ids].index_select(0, index).to(torch::kDouble).unsqueeze(1));
  EXPECT_FALSE(x[nothing].defined());
  return {weighted, x[residual] * 0.5 + weighted.mean(), torch::arange(count) + rank, splits_for(count, node, rank),
          Tensor()};
}

/// A collective of all ranks in one process.
std::array<Tensors, kGroup> reference_collective(Kind kind, std::array<Tensors, kGroup> x) {
  std::array<Tensors, kGroup> y = x;
  if (kind == Kind::exchange) {
    Tensors sent;  // [from][to]
    for (int r = 0; r < kGroup; ++r) sent.push_back(x[r][splits].dim() == 1 ? x[r][splits] : x[r][splits][0]);
    for (int to = 0; to < kGroup; ++to) {
      Tensors part_rows, part_ids, came;
      for (int from = 0; from < kGroup; ++from) {
        const auto begin = sent[from].slice(0, 0, to).sum().item<std::int64_t>();
        const auto count = sent[from][to].item<std::int64_t>();
        part_rows.push_back(x[from][rows].narrow(0, begin, count));
        part_ids.push_back(x[from][ids].narrow(0, begin, count));
        came.push_back(sent[from][to]);
      }
      y[to][rows] = torch::cat(part_rows);
      y[to][ids] = torch::cat(part_ids);
      y[to][splits] = torch::stack({torch::stack(came), sent[to]});
    }
    return y;
  }
  for (const int slot : {rows, ids}) {
    if (kind == Kind::gather) {
      for (int r = 0; r < kGroup; ++r) y[r][slot] = torch::cat({x[0][slot], x[1][slot]});
    } else {
      const Tensor sum = x[0][slot] + x[1][slot];
      for (int r = 0; r < kGroup; ++r) y[r][slot] = sum.chunk(kGroup)[r];
    }
  }
  return y;
}

Tensors leaf_weights(int rank) {
  Tensors weights;
  for (int i = 0; i < kWeights; ++i)
    weights.push_back(seeded({kWidth, kWidth}, static_cast<std::uint64_t>(10 * rank + i)).requires_grad_());
  return weights;
}

Tensors inputs_of(int rank, std::uint64_t seed) {
  return {seeded({6, kWidth}, seed + static_cast<std::uint64_t>(rank)).requires_grad_(),
          seeded({2, kWidth}, seed + 7 + static_cast<std::uint64_t>(rank)).requires_grad_(),
          torch::arange(6) + 3 * rank, splits_for(6, static_cast<std::size_t>(seed % 5), rank), Tensor()};
}

Tensors output_gradients(const Tensors& outputs, std::uint64_t seed) {
  Tensors gradients;
  for (const Tensor& output : outputs) {
    ++seed;
    gradients.push_back(output.defined() && output.is_floating_point() ? seeded(output.sizes().vec(), seed) : Tensor());
  }
  return gradients;
}

struct Truth {
  std::array<Tensors, kGroup> outputs, input_gradients, weight_gradients;
};

Truth reference(const Spec& spec, std::uint64_t seed) {
  std::array<Tensors, kGroup> inputs{inputs_of(0, seed), inputs_of(1, seed)}, weights{leaf_weights(0), leaf_weights(1)};
  std::array<Tensors, kGroup> x = inputs;
  for (std::size_t node = 0; node < spec.kinds.size(); ++node) {
    if (spec.kinds[node] != Kind::compute) {
      x = reference_collective(spec.kinds[node], x);
      continue;
    }
    for (int r = 0; r < kGroup; ++r) x[r] = compute_node(spec, node, r, weights[r][spec.weights[node]], x[r]);
  }
  Tensor objective = torch::zeros({}, torch::kDouble);
  for (int r = 0; r < kGroup; ++r) {
    const Tensors gradients = output_gradients(x[r], seed + 100 * static_cast<std::uint64_t>(r));
    for (const int slot : {rows, residual}) objective = objective + (x[r][slot] * gradients[slot]).sum();
  }
  objective.backward();
  Truth truth;
  for (int r = 0; r < kGroup; ++r) {
    for (const Tensor& tensor : x[r]) truth.outputs[r].push_back(tensor.defined() ? tensor.detach() : tensor);
    for (const Tensor& tensor : inputs[r])
      truth.input_gradients[r].push_back(tensor.defined() ? tensor.grad() : Tensor());
    for (const Tensor& tensor : weights[r]) truth.weight_gradients[r].push_back(tensor.grad());
  }
  return truth;
}

Stage build(const Spec& spec, const std::string& name, int rank, const Tensors& weights,
            const std::shared_ptr<Communicator>& group, std::vector<std::string>& log) {
  Stage stage;
  for (std::size_t node = 0; node < spec.kinds.size(); ++node) {
    const std::string node_name = name + std::to_string(node);
    const auto logged = [&](std::shared_ptr<Collective> inner) {
      return std::make_shared<LoggedCollective>(std::move(inner), node_name, log);
    };
    switch (spec.kinds[node]) {
      case Kind::compute:
        stage.compute(node_name, [=](const Tensors& x, const StageContext&) {
          return compute_node(spec, node, rank, weights[spec.weights[node]], x);
        });
        break;
      case Kind::exchange:
        stage.communicate(node_name, logged(all_to_all(group)), {rows, ids, splits});
        break;
      case Kind::gather:
        stage.communicate(node_name, logged(all_gather(group)), {rows, ids});
        break;
      case Kind::scatter:
        stage.communicate(node_name, logged(reduce_scatter(group)), {rows, ids});
        break;
    }
  }
  return stage;
}

/// Any chain whose collectives fit what comes before them. No two computing nodes in a row, which would be one.
Spec random_spec(std::mt19937& random, std::size_t max_nodes) {
  Spec spec;
  const std::size_t count = random() % (max_nodes + 1);
  int in_a_row = 0;
  for (std::size_t node = 0; node < count; ++node) {
    const bool after_compute = node > 0 && spec.kinds.back() == Kind::compute;
    Kind kind = Kind::compute;
    if (after_compute || (random() % 3 == 0 && in_a_row < 2)) {
      const bool even = node == 0 || after_compute || spec.kinds.back() == Kind::gather;
      const std::vector<Kind> choices = even ? std::vector{Kind::exchange, Kind::gather, Kind::scatter}
                                        : spec.kinds.back() == Kind::exchange
                                            ? std::vector{Kind::exchange, Kind::gather}
                                            : std::vector{Kind::gather};
      kind = choices[random() % choices.size()];
      // Behind a gather, the splits are still those of fewer rows.
      if (kind == Kind::exchange && node > 0 && spec.kinds.back() == Kind::gather) kind = Kind::gather;
    }
    in_a_row = kind == Kind::compute ? 0 : in_a_row + 1;
    spec.kinds.push_back(kind);
    spec.weights.push_back(static_cast<int>(random() % kWeights));
  }
  return spec;
}

/// Any order that runs each chain's nodes in sequence and a weight part behind its input part.
std::vector<PairOp> random_order(std::mt19937& random, const std::string& forward, const std::string& backward) {
  std::vector<PairOp> order, weights;
  int next_forward = 0, next_backward = static_cast<int>(backward.size()) - 1;
  while (next_forward < static_cast<int>(forward.size()) || next_backward >= 0 || !weights.empty()) {
    const auto choice = random() % 3;
    if (choice == 0 && next_forward < static_cast<int>(forward.size())) {
      order.push_back({PairSide::forward, next_forward++});
    } else if (choice == 1 && next_backward >= 0) {
      if (backward[next_backward] == 'C') weights.push_back({PairSide::weight, next_backward});
      order.push_back({PairSide::backward, next_backward--});
    } else if (choice == 2 && !weights.empty()) {
      const auto chosen = weights.begin() + static_cast<std::ptrdiff_t>(random() % weights.size());
      order.push_back(*chosen);
      weights.erase(chosen);
    }
  }
  return order;
}

void expect_equal(const Tensors& actual, const Tensors& expected, const char* what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(actual[i].defined(), expected[i].defined()) << what << " " << i;
    if (!actual[i].defined()) continue;
    ASSERT_EQ(actual[i].sizes(), expected[i].sizes()) << what << " " << i;
    EXPECT_TRUE(torch::allclose(actual[i], expected[i], 1e-12, 1e-13)) << what << " " << i;
  }
}

Tensors gradients_of(const Tensors& tensors) {
  Tensors gradients;
  for (const Tensor& tensor : tensors) gradients.push_back(tensor.grad());
  return gradients;
}

/// What a pair has said, from its first event to its last.
struct Told {
  explicit Told(PairRun& pair) : pair_(pair) {}

  void take(const PairEvent& event) {
    switch (event.kind) {
      case PairEvent::Kind::computed:
        ran.push_back(event.op);
        break;
      case PairEvent::Kind::launched:
        ++launched;
        break;
      case PairEvent::Kind::must_wait:
        take(pair_.wait());
        break;
      case PairEvent::Kind::received:
        EXPECT_TRUE(event.pending.done());
        ++collectives;
        break;
      case PairEvent::Kind::over:
        ++(event.op.side == PairSide::forward ? forwards : backwards);
        break;
    }
  }
  /// To the end of the order.
  void run() {
    while (const std::optional<PairEvent> event = pair_.next()) take(*event);
  }
  /// To the end of the collectives that trail.
  void finish() {
    while (pair_.trails()) {
      take(pair_.wait());
      run();
    }
  }

  std::vector<PairOp> ran;
  int launched = 0, collectives = 0, forwards = 0, backwards = 0;

 private:
  PairRun& pair_;
};

/// A pair of a forward through one chain and a backward through another, in `order`; then the first one's backward.
void run_case(int rank, const std::shared_ptr<Communicator>& group, const Spec& ahead, const Spec& back,
              const std::vector<PairOp>& order, const Truth& ahead_truth, const Truth& back_truth,
              std::vector<std::string>& log) {
  const Tensors ahead_weights = leaf_weights(rank), back_weights = leaf_weights(rank);
  const Stage ahead_stage = build(ahead, "a", rank, ahead_weights, group, log);
  const Stage back_stage = build(back, "b", rank, back_weights, group, log);
  const auto r = static_cast<std::size_t>(rank);
  const auto gradient_seed = [&](std::uint64_t seed) { return seed + 100 * static_cast<std::uint64_t>(rank); };

  StageRun backward = back_stage.forward(inputs_of(rank, 50), context(0));
  expect_equal(backward.outputs(), back_truth.outputs[r], "output of b");
  log.clear();

  StageRun forward(ahead_stage, inputs_of(rank, 20), context(1));
  backward.start_backward(output_gradients(backward.outputs(), gradient_seed(50)));
  PairRun pair(order, &forward, &backward);
  Told told(pair);
  told.run();
  told.finish();
  EXPECT_EQ(told.forwards, 1);
  EXPECT_EQ(told.backwards, 1);
  std::vector<PairOp> computing = order;
  std::vector<std::string> collectives;
  std::erase_if(computing, [&](const PairOp& piece) {
    const bool is_forward = piece.side == PairSide::forward;
    const auto& stage = is_forward ? ahead_stage : back_stage;
    if (stage.structure()[piece.node] == 'C') return false;
    collectives.push_back(stage.chain_name(piece.node) + (is_forward ? " F1" : " B0"));
    return true;
  });
  EXPECT_EQ(told.ran, computing);
  EXPECT_EQ(told.launched, static_cast<int>(collectives.size()));
  EXPECT_EQ(told.collectives, static_cast<int>(collectives.size()));
  EXPECT_EQ(log, collectives);

  forward.finish_forward();
  expect_equal(forward.outputs(), ahead_truth.outputs[r], "output of a");
  expect_equal(backward.finish_backward(), back_truth.input_gradients[r], "input gradient of b");
  expect_equal(gradients_of(back_weights), back_truth.weight_gradients[r], "weight gradient of b");
  expect_equal(forward.backward_input(output_gradients(forward.outputs(), gradient_seed(20))),
               ahead_truth.input_gradients[r], "input gradient of a");
  forward.backward_weight();
  expect_equal(gradients_of(ahead_weights), ahead_truth.weight_gradients[r], "weight gradient of a");
}

std::string structure_of(const Spec& spec) { return spec.kinds.empty() ? "C" : spec.structure(); }

TEST(Chain, RandomPairsInTheRulesOrderAndInAnyOtherEqualOneProcess) {
  const unsigned seed = 4711;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const int num_cases = 200;
  std::vector<Spec> ahead, back;
  std::vector<std::vector<PairOp>> orders;
  std::vector<Truth> ahead_truth, back_truth;
  for (int i = 0; i < num_cases; ++i) {
    ahead.push_back(random_spec(random, 7));
    back.push_back(random_spec(random, 7));
    const std::string f = structure_of(ahead.back()), b = structure_of(back.back());
    orders.push_back(i % 4 == 3 ? random_order(random, f, b) : launch_order(f, b, pair_order(f, b)));
    ahead_truth.push_back(reference(ahead.back(), 20));
    back_truth.push_back(reference(back.back(), 50));
  }
  std::vector<std::vector<std::string>> logs(kGroup);
  run_ranks(kGroup, [&](std::shared_ptr<Communicator> group) {
    const int rank = group->rank();
    for (int i = 0; i < num_cases; ++i) {
      SCOPED_TRACE("rank " + std::to_string(rank) + ", case " + std::to_string(i) + ": " + structure_of(ahead[i]) +
                   " with " + structure_of(back[i]));
      run_case(rank, group, ahead[i], back[i], orders[i], ahead_truth[i], back_truth[i], logs[rank]);
      ASSERT_FALSE(::testing::Test::HasFailure());
    }
  });
}

TEST(Chain, DelayedAndSerialNetworksGiveTheSame) {
  const Spec moe{{Kind::compute, Kind::exchange, Kind::compute, Kind::exchange}, {0, 0, 1, 0}};
  const Spec dense{{Kind::compute}, {2}};
  for (const Network network : {Network::serial, Network::delayed}) {
    for (const auto& [ahead, back] : {std::pair{moe, moe}, std::pair{dense, moe}, std::pair{moe, dense}}) {
      const std::string f = ahead.structure(), b = back.structure();
      SCOPED_TRACE(f + " with " + b + (network == Network::serial ? ", serial" : ", delayed"));
      const auto order = launch_order(f, b, pair_order(f, b));
      const Truth ahead_truth = reference(ahead, 20), back_truth = reference(back, 50);
      run_ranks(kGroup, [&, ahead = ahead, back = back](std::shared_ptr<Communicator> group) {
        std::vector<std::string> log;
        run_case(group->rank(), over(network, group, std::chrono::milliseconds(2)), ahead, back, order, ahead_truth,
                 back_truth, log);
      });
    }
  }
}

/// Rank 1 does nothing before rank 0 has called go().
struct Start {
  explicit Start(std::shared_ptr<Communicator> comm) : group(std::move(comm)) {
    if (group->rank() == 1) group->receive(0).wait();
  }
  void go() const {
    if (group->rank() == 0) group->send(1, {});
  }
  bool first() const { return group->rank() == 0; }
  std::shared_ptr<Communicator> group;
};

TEST(Chain, ALaunchDoesNotWait) {
  run_ranks(kGroup, [](std::shared_ptr<Communicator> group) {
    const Start start(group);
    bool ran = false;
    Stage stage;
    stage.communicate("gather", all_gather(group), {0}).compute("after", [&](const Tensors& x, const StageContext&) {
      ran = true;
      return x;
    });
    StageRun pass(stage, {torch::ones({2, 2})}, context(0));
    pass.advance();
    EXPECT_TRUE(pass.under_way());
    if (start.first()) {
      EXPECT_FALSE(pass.under_way().done());
    }
    EXPECT_FALSE(ran);
    start.go();
    pass.advance();
    EXPECT_FALSE(pass.under_way());
    EXPECT_TRUE(ran);
    pass.finish_forward();
    EXPECT_EQ(pass.outputs()[0].size(0), 4);
  });
}

TEST(Chain, ACollectiveThatEndsAChainIsLeftUnderWay) {
  run_ranks(kGroup, [](std::shared_ptr<Communicator> group) {
    const Start start(group);
    Stage stage;
    stage.compute("double", [](const Tensors& x, const StageContext&) { return Tensors{x[0] * 2}; })
        .communicate("gather", all_gather(group), {0});
    StageRun run(stage, {torch::ones({2, 2})}, context(0));
    const std::vector<PairOp> order = launch_order("CX", "", pair_order("CX", ""));
    PairRun pair(order, &run, nullptr);
    Told told(pair);
    told.run();
    if (start.first()) {
      EXPECT_EQ(told.forwards, 0);
      EXPECT_TRUE(pair.trails());
      EXPECT_FALSE(pair.next().has_value());
    }
    start.go();
    told.finish();
    EXPECT_FALSE(pair.trails());
    EXPECT_EQ(told.forwards, 1);
    run.finish_forward();
    EXPECT_TRUE(torch::equal(run.outputs().at(0), torch::full({4, 2}, 2.0)));
  });
}

/// Notes when it is prepared and launched.
class Prepared final : public ForwardingCollective {
 public:
  Prepared(std::shared_ptr<Collective> inner, std::vector<std::string>& log)
      : ForwardingCollective(std::move(inner)), log_(log) {}
  std::any prepare(const Tensors& inputs) override {
    log_.push_back(detail::str("prepare ", inputs.at(0).size(0)));
    return inputs.at(0).size(0);
  }
  Launched forward(Tensors inputs, const StageContext& context) override {
    const auto* const known = std::any_cast<std::int64_t>(&context.prepared);
    log_.push_back(known != nullptr ? detail::str("forward ", *known) : "forward unprepared");
    return ForwardingCollective::forward(std::move(inputs), context);
  }

 private:
  std::vector<std::string>& log_;
};

TEST(Chain, ACollectiveIsPreparedBehindItsInputsAndLaunchedLater) {
  run_ranks(1, [](std::shared_ptr<Communicator> group) {
    std::vector<std::string> log;
    const auto gather = [&] { return std::make_shared<Prepared>(all_gather(group), log); };
    const Compute longer = [&](const Tensors& x, const StageContext& context) {
      EXPECT_FALSE(context.prepared.has_value());
      log.emplace_back("compute");
      return Tensors{torch::cat({x[0], x[0]})};
    };
    Stage stage;
    stage.communicate("first", gather(), {0})
        .compute("longer", longer)
        .communicate("second", gather(), {0})
        .compute("longer", longer)
        .compute("longer", longer)
        .communicate("third", gather(), {0});
    StageRun run(stage, {torch::ones({2, 2})}, context(0));
    while (!run.advanced()) {
      run.advance();
      log.emplace_back("|");
    }
    run.finish_forward();
    EXPECT_THAT(log, ::testing::ElementsAre("forward unprepared", "|", "compute", "prepare 4", "|", "forward 4", "|",
                                            "compute", "compute", "prepare 16", "|", "forward 16", "|"));
  });
}

// --- the collectives
// --------------------------------------------------------------------------------------------------------------

/// What each rank's body throws, in turn of ranks. A rank that throws aborts, as a pipeline does.
std::vector<std::string> errors_of(int num_ranks, const std::function<void(std::shared_ptr<Communicator>)>& body) {
  std::vector<std::string> errors(static_cast<std::size_t>(num_ranks));
  std::mutex mutex;
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> group) {
    try {
      body(group);
    } catch (const Error& error) {
      group->abort(error.what());
      const std::lock_guard lock(mutex);
      errors[group->rank()] = error.what();
    }
  });
  return errors;
}

Tensors moved(const std::shared_ptr<Collective>& collective, Tensors inputs) {
  return collective->forward(std::move(inputs), context(0)).pending.take();
}

TEST(AllToAll, RefusesSplitsThatDoNotFit) {
  const auto error = [](const Tensor& rows_, const Tensor& splits_) {
    return errors_of(1, [&](std::shared_ptr<Communicator> group) { moved(all_to_all(group), {rows_, splits_}); })[0];
  };
  const Tensor x = torch::ones({5, 3});
  EXPECT_EQ(error(x, torch::tensor({std::int64_t{5}})), "");
  EXPECT_THAT(error(x, torch::tensor({std::int64_t{4}})),
              AllOf(HasSubstr("the splits [4] add up to 4 rows"), HasSubstr("tensor 0 is [float32 [5, 3]]")));
  EXPECT_THAT(error(x, torch::tensor({std::int64_t{-1}})), HasSubstr("got [-1]"));
  EXPECT_THAT(error(x, torch::ones({1})), HasSubstr("got [float32 [1]]"));
  EXPECT_THAT(error(x, torch::ones({2}, torch::kLong)), HasSubstr("sizes [1] or [2, 1]"));
  EXPECT_THAT(error(x, Tensor()), HasSubstr("got [undefined]"));
  EXPECT_EQ(error(x, torch::tensor({2, 0, 3}, torch::kLong).view({1, 1, 3})), "");
  EXPECT_THAT(error(x, torch::tensor({2, 4}, torch::kLong).view({1, 1, 2})), HasSubstr("the splits [6] add up to 6"));
  EXPECT_THAT(error(x, torch::tensor({6, -1}, torch::kLong).view({1, 1, 2})), HasSubstr("got [6, -1]"));
  EXPECT_THAT(error(x, torch::ones({1, 2, 2}, torch::kLong)), HasSubstr("[1, 1, kinds] or [2, 1, kinds]"));
  EXPECT_THAT(error(x, torch::ones({1, 1}, torch::kLong)), HasSubstr("got [int64 [1, 1]]"));
  EXPECT_THAT(error(torch::ones({}), torch::zeros({1}, torch::kLong)), HasSubstr("tensor 0 has no dimensions"));
  EXPECT_THAT(errors_of(1, [&](std::shared_ptr<Communicator> group) { moved(all_to_all(group), {x}); })[0],
              HasSubstr("as the last of them, their splits"));
  EXPECT_THAT(errors_of(1, [&](std::shared_ptr<Communicator>) { all_to_all(nullptr); })[0], HasSubstr("got null"));
}

TEST(AllToAll, RowsOfSeveralKindsBringTheirNumbersThereAndBack) {
  constexpr int kMembers = 3, kKinds = 2;
  run_ranks(kMembers, [](std::shared_ptr<Communicator> group) {
    const std::int64_t me = group->rank();
    const auto count = [](std::int64_t from, std::int64_t to, std::int64_t kind) { return (from + 2 * to + kind) % 3; };
    const auto table = [&](bool sends) {
      Tensor all = torch::zeros({kMembers, kKinds}, torch::kLong);
      for (std::int64_t r = 0; r < kMembers; ++r)
        for (std::int64_t kind = 0; kind < kKinds; ++kind)
          all[r][kind] = sends ? count(me, r, kind) : count(r, me, kind);
      return all;
    };
    const Tensor sent = table(true), came = table(false);
    // A row is sender, receiver and kind.
    const auto rows_of = [&](const Tensor& numbers, bool sends) {
      Tensors all{torch::zeros({0, 3}, torch::kLong)};
      for (std::int64_t r = 0; r < kMembers; ++r)
        for (std::int64_t kind = 0; kind < kKinds; ++kind)
          all.push_back(torch::tensor({sends ? me : r, sends ? r : me, kind}, torch::kLong)
                            .expand({numbers[r][kind].item<std::int64_t>(), 3}));
      return torch::cat(all);
    };
    const Tensor rows_there = rows_of(sent, true);
    const Tensors dispatched = moved(all_to_all(group), {rows_there, sent.unsqueeze(0)});
    EXPECT_TRUE(torch::equal(dispatched[0], rows_of(came, false)));
    EXPECT_TRUE(torch::equal(dispatched[1], torch::stack({came, sent})));
    const Tensors combined = moved(all_to_all(group), dispatched);
    EXPECT_TRUE(torch::equal(combined[0], rows_there));
    EXPECT_TRUE(torch::equal(combined[1], torch::stack({sent, came})));
  });
}

TEST(AllToAll, RanksThatDisagreeAboutKindsAllFail) {
  for (const std::string& error : errors_of(2, [](std::shared_ptr<Communicator> group) {
         const Tensor counts = torch::ones({1, 2, 1 + group->rank()}, torch::kLong);
         moved(all_to_all(group), {torch::ones({counts.sum().item<std::int64_t>(), 3}), counts});
         group->barrier().wait();
       }))
    EXPECT_THAT(error, AllOf(HasSubstr("[int64 [1]]"), HasSubstr("[int64 [2]]")));
}

TEST(AllToAll, RanksThatDisagreeAboutSplitsAllFail) {
  const auto errors = errors_of(2, [](std::shared_ptr<Communicator> group) {
    // Rank 0 expects two rows from rank 1, which sends three.
    const std::int64_t me = group->rank();
    const Tensor counts = me == 0 ? torch::tensor({{1, 1}, {1, 2}}, torch::kLong) : torch::tensor({3, 1}, torch::kLong);
    moved(all_to_all(group), {torch::ones({me == 0 ? 2 : 4, 3}), counts});
    group->barrier().wait();
  });
  EXPECT_THAT(errors[0], HasSubstr("rank 0 of the group expects by its splits [1, 2] rows from the ranks of the group, "
                                   "but tensor 0 came with [1, 3]"));
  EXPECT_THAT(errors[1], HasSubstr("expects by its splits [1, 2]"));
}

TEST(Collectives, RanksMustMoveTheSameKindsOfTensors) {
  const auto with = [](const Tensor& first, const Tensor& second) {
    return errors_of(2, [&](std::shared_ptr<Communicator> group) {
      moved(all_gather(group), {group->rank() == 0 ? first : second});
      group->barrier().wait();
    });
  };
  for (const auto& other : {torch::ones({2, 4}), torch::ones({2, 3}, torch::kDouble), torch::ones({2}), Tensor()}) {
    for (const std::string& error : with(torch::ones({2, 3}), other))
      EXPECT_THAT(error, HasSubstr("disagree about tensor 0"));
  }
  for (const std::string& error : with(torch::ones({2, 3}), torch::ones({9, 3}))) EXPECT_EQ(error, "");

  EXPECT_THAT(
      errors_of(2, [](std::shared_ptr<Communicator> group) { moved(reduce_scatter(group), {torch::ones({3, 2})}); })[0],
      HasSubstr("must divide its number of rows"));
  for (const std::string& error : errors_of(2, [](std::shared_ptr<Communicator> group) {
         moved(reduce_scatter(group), {torch::ones({2 + 2 * group->rank(), 2})});
         group->barrier().wait();
       }))
    EXPECT_THAT(error, HasSubstr("different numbers of rows"));
}

TEST(Collectives, WhoHasNoGradientSendsNone) {
  run_ranks(kGroup, [](std::shared_ptr<Communicator> group) {
    for (const auto& collective : {all_to_all(group), all_gather(group), reduce_scatter(group)}) {
      Tensors inputs{torch::ones({4, 2}), torch::arange(4)};
      inputs[0].set_requires_grad(group->rank() == 0);  // frozen on rank 1 only
      inputs.push_back(torch::full({kGroup}, 2, torch::kLong));
      auto launched = collective->forward(inputs, context(0));
      const Tensors outputs = launched.pending.take();
      ASSERT_EQ(outputs.size(), 3U);
      EXPECT_TRUE(outputs[0].requires_grad());  // some of its rows are rank 0's
      EXPECT_FALSE(outputs[1].requires_grad());
      // Rank 1 has no gradient to give.
      Tensors gradients(3);
      if (group->rank() == 0) gradients[0] = torch::ones_like(outputs[0]);
      const Tensors result = collective->backward(launched.handle, gradients).take();
      ASSERT_EQ(result.size(), 3U);
      EXPECT_EQ(result[0].defined(), group->rank() == 0);
      if (result[0].defined()) {
        EXPECT_EQ(result[0].sizes(), inputs[0].sizes());
      }
      EXPECT_FALSE(result[1].defined());
      EXPECT_FALSE(result[2].defined());
    }
  });
}

TEST(Collectives, UndefinedTensorsAndRanksWithoutRows) {
  run_ranks(kGroup, [](std::shared_ptr<Communicator> group) {
    const bool first = group->rank() == 0;
    const Tensors outputs =
        moved(all_to_all(group), {first ? torch::ones({0, 3}) : torch::full({2, 3}, 7.0), Tensor(),
                                  first ? torch::zeros({2}, torch::kLong) : torch::tensor({2, 0}, torch::kLong)});
    EXPECT_EQ(outputs[0].size(0), first ? 2 : 0);
    EXPECT_EQ(outputs[0].size(1), 3);
    EXPECT_FALSE(outputs[1].defined());
    const Tensor expected =
        first ? torch::tensor({{0, 2}, {0, 0}}, torch::kLong) : torch::tensor({{0, 0}, {2, 0}}, torch::kLong);
    EXPECT_TRUE(torch::equal(outputs[2], expected));
    EXPECT_FALSE(moved(all_gather(group), {Tensor()})[0].defined());
    EXPECT_FALSE(moved(reduce_scatter(group), {Tensor()})[0].defined());
  });
}

}  // namespace
}  // namespace dualpipe::test
