#include "dualpipe/stage/partition.hpp"
#include "dualpipe/stage/stage_run.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "dualpipe/error.hpp"
#include "dualpipe/stage/as_stage.hpp"
#include "error_of.hpp"

namespace dualpipe {
namespace {

using test::error_of;

using testing::ElementsAre;
using testing::HasSubstr;
using torch::Tensor;

double costliest(const std::vector<double>& costs, const std::vector<int>& cuts) {
  double most = 0;
  for (std::size_t s = 0; s + 1 < cuts.size(); ++s) {
    double cost = 0;
    for (int i = cuts[s]; i < cuts[s + 1]; ++i) cost += costs[i];
    most = std::max(most, cost);
  }
  return most;
}

/// All cuts tried.
double best_of_all(const std::vector<double>& costs, int num_stages) {
  double best = std::numeric_limits<double>::infinity();
  std::vector<int> cuts{0};
  const std::function<void()> extend = [&] {
    const int stages_left = num_stages - static_cast<int>(cuts.size()) + 1;
    if (stages_left == 1) {
      cuts.push_back(static_cast<int>(costs.size()));
      best = std::min(best, costliest(costs, cuts));
      cuts.pop_back();
      return;
    }
    for (int next = cuts.back() + 1; next <= static_cast<int>(costs.size()) - stages_left + 1; ++next) {
      cuts.push_back(next);
      extend();
      cuts.pop_back();
    }
  };
  extend();
  return best;
}

TEST(Balance, KnownCuts) {
  EXPECT_THAT(balance({1, 1, 1, 1}, 2), ElementsAre(0, 2, 4));
  EXPECT_THAT(balance({1, 1, 1}, 3), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(balance({5}, 1), ElementsAre(0, 1));
  EXPECT_THAT(balance({10, 1, 1, 1, 1, 1}, 2), ElementsAre(0, 1, 6));
  EXPECT_THAT(balance({1, 1, 1, 1, 1, 10}, 3), ElementsAre(0, 2, 5, 6));
  EXPECT_THAT(balance({1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 4), ElementsAre(0, 2, 5, 7, 10));  // not 3, 3, 3, 1
}

TEST(Balance, IsTheOptimumOfAllCuts) {
  const unsigned seed = 20240611;
  std::mt19937 draw(seed);
  for (int trial = 0; trial < 400; ++trial) {
    const int num_layers = 1 + static_cast<int>(draw() % 11);
    const int num_stages = 1 + static_cast<int>(draw() % static_cast<unsigned>(num_layers));
    std::vector<double> costs;
    for (int i = 0; i < num_layers; ++i) costs.push_back(1 + static_cast<double>(draw() % (trial % 2 ? 5 : 1000)));
    const auto cuts = balance(costs, num_stages);
    SCOPED_TRACE("seed " + std::to_string(seed) + ", trial " + std::to_string(trial));
    ASSERT_EQ(cuts.size(), static_cast<std::size_t>(num_stages) + 1);
    ASSERT_EQ(cuts.front(), 0);
    ASSERT_EQ(cuts.back(), num_layers);
    for (int s = 0; s < num_stages; ++s) ASSERT_LT(cuts[s], cuts[s + 1]);
    ASSERT_EQ(costliest(costs, cuts), best_of_all(costs, num_stages));
  }
}

TEST(Balance, ThousandsOfLayersAndExtremeCosts) {
  std::vector<double> costs(5000, 1.0);
  costs[2500] = 1e6;
  const auto cuts = balance(costs, 64);
  ASSERT_EQ(cuts.size(), 65U);
  EXPECT_EQ(costliest(costs, cuts), 1e6);
  EXPECT_EQ(cuts, balance(costs, 64));
  EXPECT_EQ(balance(std::vector<double>(5000, 1e-300), 5000).size(), 5001U);
  EXPECT_THAT(balance({1e-9, 1e9, 1e-9}, 3), ElementsAre(0, 1, 2, 3));
}

TEST(Balance, RefusesWhatCannotBeCut) {
  EXPECT_THAT(error_of([] { balance({1, 1}, 3); }), HasSubstr("2 layers for 3 stages"));
  EXPECT_THAT(error_of([] { balance({1, 1}, 0); }), HasSubstr("at least one stage, got 0"));
  EXPECT_THAT(error_of([] { balance({1, 0}, 1); }), HasSubstr("layer 1 must be positive and finite, got 0"));
  EXPECT_THAT(error_of([] { balance({1, std::numeric_limits<double>::quiet_NaN()}, 1); }), HasSubstr("nan"));
  EXPECT_THAT(error_of([] { balance({1e308, 1e308}, 1); }), HasSubstr("scale them down"));
}

NamedLayer linear(const std::string& name, int in, int out) {
  return {name, [=] { return as_stage(torch::nn::Linear(in, out)); }};
}

std::vector<std::string> keys(const Stage& stage) {
  std::vector<std::string> result;
  for (const auto& item : stage.module()->named_parameters()) result.push_back(item.key());
  return result;
}

TEST(Split, StagesHoldTheirLayersUnderTheirNames) {
  int made = 0;
  const auto factory = split({linear("embed", 4, 8),
                              {"blocks.0",
                               [&] {
                                 ++made;
                                 return as_stage(torch::nn::Sequential(torch::nn::Linear(8, 8), torch::nn::GELU()));
                               }},
                              linear("blocks.1", 8, 8),
                              linear("head", 8, 2)},
                             2);
  EXPECT_EQ(made, 0);
  EXPECT_THAT(keys(factory(0)), ElementsAre("embed.weight", "embed.bias", "blocks.0.0.weight", "blocks.0.0.bias"));
  EXPECT_EQ(made, 1);
  EXPECT_THAT(keys(factory(1)), ElementsAre("blocks.1.weight", "blocks.1.bias", "head.weight", "head.bias"));
  EXPECT_EQ(made, 1);
  EXPECT_THAT(factory(0).node_names(), ElementsAre("embed.forward", "blocks.0.forward"));
  EXPECT_THAT(error_of([&] { factory(2); }), HasSubstr("stages 0 to 1, got stage 2"));
  EXPECT_THAT(error_of([&] { factory(-1); }), HasSubstr("got stage -1"));
}

TEST(Split, ComputesWhatTheLayersDo) {
  const auto factory = split(
      {linear("a", 4, 8),
       {"relu",
        [] {
          Stage stage;
          stage.compute("f", [](const Tensors& x, const StageContext&) -> Tensors { return {torch::relu(x.at(0))}; });
          return stage;
        }},
       linear("b", 8, 2)},
      1);
  const Stage stage = factory(0);
  const Tensors none;
  const Tensor x = torch::randn({3, 4});
  auto activation = stage.forward({x}, StageContext{0, 0, 0, true, none});
  const auto p = stage.module()->named_parameters();
  const Tensor expected =
      torch::linear(torch::relu(torch::linear(x, p["a.weight"], p["a.bias"])), p["b.weight"], p["b.bias"]);
  EXPECT_TRUE(torch::equal(activation.outputs().at(0), expected));
  EXPECT_THAT(error_of([&] { stage.forward({x, x}, StageContext{0, 0, 0, true, none}); }),
              HasSubstr("takes 1 tensor, got 2"));
}

TEST(Split, OneLayerThatDoesNotSplitItsBackwardStopsItsStageOnly) {
  const auto factory = split({linear("a", 4, 4),
                              {"b", [] { return as_stage(torch::nn::Linear(4, 4)).split_backward(false); }},
                              linear("c", 4, 4),
                              linear("d", 4, 4)},
                             2);
  EXPECT_FALSE(factory(0).splits_backward());
  EXPECT_TRUE(factory(1).splits_backward());
}

TEST(Split, RefusesBadLayers) {
  const auto layer = [](const std::string& name) { return linear(name, 4, 4); };
  EXPECT_THAT(error_of([&] { split({layer("a"), layer("a")}, 1); }), HasSubstr("two layers are named 'a'"));
  EXPECT_THAT(error_of([&] { split({layer("")}, 1); }), HasSubstr("must not be empty"));
  EXPECT_THAT(error_of([&] { split({layer("a..b")}, 1); }), HasSubstr("'a..b'"));
  EXPECT_THAT(error_of([&] { split({layer(".a")}, 1); }), HasSubstr("'.a'"));
  EXPECT_THAT(error_of([&] { split({layer("a.b.c"), layer("a.b")}, 1); }),
              HasSubstr("'a.b.c' lies inside of layer 'a.b'"));
  EXPECT_THAT(error_of([&] { split({{"a", nullptr}}, 1); }), HasSubstr("'a' has no function"));
  EXPECT_THAT(error_of([&] { split({layer("a"), layer("b")}, 1, {1.0}); }), HasSubstr("got 1 costs for 2 layers"));
  EXPECT_THAT(error_of([&] { split({layer("a")}, 2); }), HasSubstr("1 layers for 2 stages"));
}

TEST(Split, ByHand) {
  const auto layers = [] { return std::vector{linear("a", 4, 4), linear("b", 4, 4), linear("c", 4, 4)}; };
  for (const StageFactory& factory : {split(layers(), {1, 2}), split(layers(), {{"a", "a"}, {"b", "c"}})}) {
    EXPECT_EQ(factory.num_stages(), 2);
    EXPECT_THAT(keys(factory(0)), ElementsAre("a.weight", "a.bias"));
    EXPECT_THAT(keys(factory(1)), ElementsAre("b.weight", "b.bias", "c.weight", "c.bias"));
  }
  EXPECT_EQ(split(layers(), {{"a", "c"}}).num_stages(), 1);
  EXPECT_EQ(split(layers(), 3).num_stages(), 3);
}

TEST(Split, ByHandRefusesWhatDoesNotCoverEveryLayerOnce) {
  const auto layers = [] {
    return std::vector{linear("a", 4, 4), linear("b", 4, 4), linear("c", 4, 4), linear("d", 4, 4)};
  };
  const auto error = [&](const auto& cut) { return error_of([&] { split(layers(), cut); }); };
  using Ranges = std::vector<LayerRange>;
  EXPECT_THAT(error(Ranges{{"a", "a"}, {"c", "d"}}), HasSubstr("layer 'b' is in none of the 2 stages"));
  EXPECT_THAT(error(Ranges{{"b", "d"}}), HasSubstr("layer 'a' is in none"));
  EXPECT_THAT(error(Ranges{{"a", "c"}}), HasSubstr("layer 'd' is in none"));
  EXPECT_THAT(error(Ranges{{"a", "c"}, {"b", "d"}}), HasSubstr("layer 'b' is in stage 0 and in stage 1"));
  EXPECT_THAT(error(Ranges{{"a", "b"}, {"c", "e"}}), HasSubstr("stage 1 takes a layer 'e' that the model does not"));
  EXPECT_THAT(error(Ranges{{"b", "a"}}), HasSubstr("stage 0 goes from layer 'b' to 'a'"));
  EXPECT_THAT(error(Ranges{{"c", "d"}, {"a", "b"}}), HasSubstr("stage 1 begins with layer 'a', which comes before"));
  EXPECT_THAT(error(Ranges{}), HasSubstr("0 stages and 4 layers"));
  using Counts = std::vector<int>;
  EXPECT_THAT(error(Counts{1, 2}), HasSubstr("layer 'd' is in no stage: the 2 stages take 3 of 4 layers"));
  EXPECT_THAT(error(Counts{3, 2}), HasSubstr("stage 1 takes 2 layers, of which only 1 are left, from 'd' on"));
  EXPECT_THAT(error(Counts{4, 1}), HasSubstr("stage 1 takes 1 layers, of which only 0 are left"));
  EXPECT_THAT(error(Counts{4, 0}), HasSubstr("stage 1 takes 0 layers"));
  EXPECT_THAT(error(Counts{5, -1}), HasSubstr("stage 0 takes 5 layers"));
  EXPECT_THAT(error(Counts{}), HasSubstr("no counts"));
}

TEST(LayersOf, AreThoseOfTheSequentialItself) {
  torch::nn::Sequential model(
      {{"in", torch::nn::Linear(4, 8)}, {"act", torch::nn::Functional(torch::relu)}, {"out", torch::nn::Linear(8, 2)}});
  const auto factory = split(layers_of(model), {2, 1});
  EXPECT_THAT(keys(factory(0)), ElementsAre("in.weight", "in.bias"));
  EXPECT_TRUE(factory(1).module()->parameters()[0].is_same(model->named_parameters()["out.weight"]));
  const Tensors none;
  const Tensor x = torch::randn({3, 4});
  const StageContext context{0, 0, 0, true, none};
  EXPECT_TRUE(torch::equal(factory(1).forward(factory(0).forward({x}, context).outputs(), context).outputs().at(0),
                           model->forward(x)));
  EXPECT_THAT(error_of([&] { factory(0).forward({x, x}, context); }), HasSubstr("takes 1 tensor, got 2"));
  EXPECT_THAT(error_of([] { layers_of(torch::nn::Sequential()); }), HasSubstr("no layers"));
}

}  // namespace
}  // namespace dualpipe
