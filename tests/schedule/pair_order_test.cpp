#include "dualpipe/schedule/pair_order.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "dualpipe/error.hpp"
#include "error_of.hpp"

namespace dualpipe {
namespace {

using test::error_of;

using ::testing::HasSubstr;

const std::vector<std::string> layer{"attention", "dispatch", "MLP", "combine"};

std::string brief(const std::vector<PairOp>& order) {
  std::string text;
  for (const PairOp& op : order) text += (text.empty() ? "" : " ") + to_string(op);
  return text;
}
std::string order(std::string_view forward, std::string_view backward, bool weights = true) {
  return brief(pair_order(forward, backward, weights));
}

/// Every node of both chains once and in its chain's order, each weight part behind its input part.
void expect_complete(const std::vector<PairOp>& ops, std::string_view forward, std::string_view backward,
                     bool weights) {
  std::vector<int> forwards, backwards, weight_nodes;
  for (const PairOp& op : ops) {
    if (op.side == PairSide::forward) forwards.push_back(op.node);
    if (op.side == PairSide::backward) backwards.push_back(op.node);
    if (op.side != PairSide::weight) continue;
    EXPECT_EQ(backward[op.node], 'C');
    EXPECT_TRUE(std::count(backwards.begin(), backwards.end(), op.node)) << "W" << op.node << " before B";
    weight_nodes.push_back(op.node);
  }
  ASSERT_EQ(forwards.size(), forward.size());
  ASSERT_EQ(backwards.size(), backward.size());
  EXPECT_TRUE(std::is_sorted(forwards.begin(), forwards.end()));
  EXPECT_TRUE(std::is_sorted(backwards.rbegin(), backwards.rend()));
  std::sort(weight_nodes.begin(), weight_nodes.end());
  EXPECT_TRUE(std::adjacent_find(weight_nodes.begin(), weight_nodes.end()) == weight_nodes.end());
  EXPECT_EQ(static_cast<std::ptrdiff_t>(weight_nodes.size()),
            weights ? std::count(backward.begin(), backward.end(), 'C') : 0);
}

TEST(PairOrder, FourNodeLayersRunInThePublishedOrder) {
  EXPECT_EQ(to_string(pair_order("CXCX", "CXCX"), layer, layer),
            "combine-B, attention-F, MLP-B, dispatch-F, dispatch-B, MLP-W, MLP-F, attention-B, attention-W, combine-F");
  EXPECT_EQ(to_string(pair_order("CXCX", "CXCX", false), layer, layer),
            "combine-B, attention-F, MLP-B, dispatch-F, dispatch-B, MLP-F, attention-B, combine-F");
}

TEST(PairOrder, AHostLaunchesCollectivesBeforeTheComputeThatHidesThem) {
  EXPECT_EQ(to_string(launch_order("CXCX", "CXCX", pair_order("CXCX", "CXCX")), layer, layer),
            "combine-B, attention-F, dispatch-F, MLP-B, dispatch-B, MLP-W, MLP-F, combine-F, attention-B, attention-W");
}

TEST(PairOrder, PlainPairsRunForwardInputWeight) {
  EXPECT_EQ(order("C", "C"), "F0 B0 W0");
  EXPECT_EQ(order("C", "C", false), "F0 B0");
  EXPECT_EQ(order("C", ""), "F0");
  EXPECT_EQ(order("", "C"), "B0 W0");
  EXPECT_EQ(order("", ""), "");
}

TEST(PairOrder, ABackwardAloneHidesItsCollectivesUnderItsWeightParts) {
  EXPECT_EQ(order("", "CXCX"), "B3 B2 B1 W2 B0 W0");
  EXPECT_EQ(order("", "CXCXC"), "B4 B3 W4 B2 B1 W2 B0 W0");
  EXPECT_EQ(order("", "CXCX", false), "B3 B2 B1 B0");
  EXPECT_EQ(order("CXCX", ""), "F0 F1 F2 F3");
}

TEST(PairOrder, UnequalChains) {
  // A dense layer's forward lies under the first collective of the other's backward.
  EXPECT_EQ(order("C", "CXCX"), "B3 F0 B2 B1 W2 B0 W0");
  // A dense layer's backward lies under the dispatch of the other's forward, its weight part behind it.
  EXPECT_EQ(order("CXCX", "C"), "F0 F1 B0 W0 F2 F3");
  // A node that a collective waits for goes first; so does the loss at the end of the last stage.
  EXPECT_EQ(order("C", "CXC"), "B2 B1 F0 W2 B0 W0");
  EXPECT_EQ(brief(pair_order("CXCX", "CXCXC")).substr(0, 14), "B4 B3 F0 F1 W4");
  // Collectives without compute between them wait for each other.
  EXPECT_EQ(order("XX", ""), "F0 F1");
  EXPECT_EQ(order("CXXC", "C"), "F0 F1 B0 W0 F2 F3");
}

TEST(PairOrder, TheRuleGivesTheTableItself) {
  // Two layers at once are no case of the table. Their first layers run in its order.
  const auto ops = pair_order("CXCXCXCX", "CXCXCXCX");
  EXPECT_EQ(brief(ops).substr(0, 29), "B7 F0 F1 B6 B5 W6 F2 F3 B4 B3");
  EXPECT_EQ(brief(launch_order("CXCXCXCX", "CXCXCXCX", ops)), brief(ops));
}

TEST(PairOrder, RandomChainsAreCompleteAndTheSameEveryTime) {
  const unsigned seed = 20240607;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto chain = [&] {
    std::string text(random() % 9, 'C');
    for (char& node : text) node = random() % 2 ? 'C' : 'X';
    return text;
  };
  for (int i = 0; i < 5000; ++i) {
    const std::string forward = chain(), backward = chain();
    const bool weights = random() % 4 != 0;
    SCOPED_TRACE("\"" + forward + "\" with \"" + backward + "\"");
    const auto ops = pair_order(forward, backward, weights);
    expect_complete(ops, forward, backward, weights);
    EXPECT_EQ(pair_order(forward, backward, weights), ops);
    const auto launched = launch_order(forward, backward, ops);
    expect_complete(launched, forward, backward, weights);
    EXPECT_EQ(launch_order(forward, backward, launched), launched);
    for (const bool communicates : {false, true}) {  // each kind keeps its order
      const auto only = [&](std::vector<PairOp> all) {
        std::erase_if(all, [&](const PairOp& op) {
          return ((op.side == PairSide::forward ? forward : backward)[op.node] == 'X') != communicates;
        });
        return all;
      };
      EXPECT_EQ(only(launched), only(ops));
    }
    if (testing::Test::HasFailure()) break;
  }
}

TEST(PairOrder, RefusesWhatIsNoChainAndNoOrderOfIt) {
  EXPECT_THAT(error_of([] { pair_order("CxC", ""); }), HasSubstr("\"CxC\""));
  EXPECT_THAT(error_of([] { launch_order("C", "C", {{PairSide::forward, 1}}); }), HasSubstr("F1"));
  EXPECT_THAT(error_of([] { launch_order("CC", "", {{PairSide::forward, 1}, {PairSide::forward, 0}}); }),
              HasSubstr("node 0 is the next"));
  EXPECT_THAT(error_of([] { launch_order("CX", "", {{PairSide::forward, 0}}); }), HasSubstr("leaves nodes"));
  EXPECT_THAT(error_of([] { to_string(pair_order("CX", ""), {"one"}, {}); }), HasSubstr("F1"));
}

}  // namespace
}  // namespace dualpipe
