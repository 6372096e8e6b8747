#include "dualpipe/planner/pair_timeline.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"

namespace dualpipe::planner {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(ParseChain, NamesMarksAndDurations) {
  const Chain chain = parse_chain("attention, dispatch@ ,MLP=2.5, combine @ = 3");
  EXPECT_EQ(chain,
            (Chain{{"attention", false, 1}, {"dispatch", true, 1.5}, {"MLP", false, 2.5}, {"combine", true, 3}}));
  EXPECT_EQ(structure(chain), "CXCX");
  EXPECT_THAT(names(chain), testing::ElementsAre("attention", "dispatch", "MLP", "combine"));
  EXPECT_EQ(parse_chain("one"), (Chain{{"one", false, 1}}));
}

TEST(ParseChain, LettersAndNothing) {
  EXPECT_EQ(parse_chain("CX"), (Chain{{"C0", false, 1}, {"X1", true, 1.5}}));
  EXPECT_EQ(parse_chain(""), Chain{});
  EXPECT_EQ(parse_chain(" none "), Chain{});
}

TEST(ParseChain, RefusesWithTheNode) {
  const auto refused = [](const char* text) { return [text] { parse_chain(text); }; };
  EXPECT_THAT(refused("a,,b"), ThrowsMessage<InvalidArgument>(HasSubstr("it has no name")));
  EXPECT_THAT(refused("a,b,"), ThrowsMessage<InvalidArgument>(HasSubstr("it has no name")));
  EXPECT_THAT(refused("@"), ThrowsMessage<InvalidArgument>(HasSubstr("node \"@\" of a chain: it has no name")));
  EXPECT_THAT(refused("@x"), ThrowsMessage<InvalidArgument>(HasSubstr("none of @")));
  for (const char* duration : {"a=0", "a=-1", "a=nan", "a=inf", "a=1e999", "a=", "a=1x", "a=1=2"})
    EXPECT_THAT(refused(duration), ThrowsMessage<InvalidArgument>(HasSubstr("is no number above 0"))) << duration;
}

/// "name begin-end", by lane.
std::string drawn(const Timeline& timeline, Lane lane) {
  std::string text;
  for (const Interval& interval : timeline.intervals)
    if (interval.lane == lane)
      text += detail::str(text.empty() ? "" : ", ", interval.node, "-", static_cast<char>(interval.step.op.pass), " ",
                          interval.begin, "-", interval.end);
  return text;
}

Timeline launched(const Chain& forward, const Chain& backward, bool weights = true) {
  const std::string ahead = structure(forward), back = structure(backward);
  return pair_timeline(forward, backward, launch_order(ahead, back, pair_order(ahead, back, weights)));
}

TEST(PairTimeline, ThePublishedPairByHand) {
  const Chain layer = parse_chain("attention,dispatch@,MLP,combine@");
  const Timeline timeline = launched(layer, layer);
  // dispatch-F is launched at 1 but combine-B holds the network until 1.5, which is what MLP-B waits for.
  EXPECT_EQ(drawn(timeline, Lane::node),
            "attention-F 0-1, MLP-I 1.5-2.5, MLP-W 2.5-3.5, MLP-F 3.5-4.5, attention-I 4.5-5.5, attention-W 5.5-6.5");
  EXPECT_EQ(drawn(timeline, Lane::collective), "combine-B 0-1.5, dispatch-F 1.5-3, dispatch-B 3-4.5, combine-F 4.5-6");
  const RankReport rank = report(timeline).ranks[0];
  EXPECT_EQ(rank.compute, 6);
  EXPECT_EQ(rank.collectives.exposed, 0.5);
  EXPECT_EQ(rank.collectives.hidden, 5.5);
  EXPECT_EQ(rank.bubble, 0);
  EXPECT_EQ(timeline.intervals.front().step, parse_step("(0F1;0B0)OVERLAP_F_B"));
}

TEST(PairTimeline, WhereNothingIsLeftToHideTheStepLastsUntilTheLastCollective) {
  const Chain layer = parse_chain("attention=2,dispatch@=5");
  const Timeline forward = launched(layer, {});
  EXPECT_EQ(drawn(forward, Lane::node), "attention-F 0-2");
  EXPECT_EQ(drawn(forward, Lane::collective), "dispatch-F 2-7");
  EXPECT_EQ(forward.intervals.front(), (Interval{0, Lane::compute, parse_step("0F1"), 0, 7, {}}));
  const Timeline backward = launched({}, layer, false);
  EXPECT_EQ(drawn(backward, Lane::collective), "dispatch-I 0-5");
  EXPECT_EQ(drawn(backward, Lane::node), "attention-I 5-7");
  EXPECT_EQ(backward.intervals.front().step, parse_step("0I0"));
}

TEST(PairTimeline, AnotherOrderCostsWhatItCosts) {
  // The backward first, then the forward, nothing of one under the other: W-MLP alone has something to hide.
  const Chain layer = parse_chain("attention,dispatch@,MLP,combine@");
  std::vector<PairOp> order = pair_order("", "CXCX");
  for (const PairOp& piece : pair_order("CXCX", "")) order.push_back(piece);
  EXPECT_EQ(report(pair_timeline(layer, layer, order)).makespan, 1.5 + 1 + 1.5 + 1 + 1 + (1 + 1.5 + 1 + 1.5));
}

TEST(PairTimeline, NeverWorseThanOneAfterTheOtherNorBetterThanItsParts) {
  const unsigned seed = 4711;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto chain = [&] {
    Chain nodes(random() % 7);
    for (ChainNode& node : nodes) node = {"n", random() % 2 == 0, 0.1 + 0.01 * static_cast<double>(random() % 300)};
    return nodes;
  };
  for (int trial = 0; trial < 1000; ++trial) {
    const Chain forward = chain(), backward = chain();
    if (forward.empty() && backward.empty()) continue;
    const Timeline timeline = launched(forward, backward);
    double computing = 0, network = 0;
    for (const Interval& interval : timeline.intervals) {
      if (interval.lane == Lane::node) computing += interval.end - interval.begin;
      if (interval.lane == Lane::collective) network += interval.end - interval.begin;
    }
    const Report result = report(timeline);
    EXPECT_LE(result.makespan, computing + network + 1e-9);
    EXPECT_GE(result.makespan, std::max(computing, network) - 1e-9);
    EXPECT_NEAR(result.ranks[0].compute, computing, 1e-9);            // one thread
    EXPECT_NEAR(result.ranks[0].collectives.total(), network, 1e-9);  // one network
    EXPECT_NEAR(result.ranks[0].bubble, 0, 1e-9);                     // it waits for collectives only
  }
}

TEST(PairTimeline, RefusesWhatIsNoOrder) {
  const Chain layer = parse_chain("CX");
  EXPECT_THAT([&] { pair_timeline(layer, {}, {{PairSide::forward, 1}}); },
              ThrowsMessage<InvalidArgument>(HasSubstr("node 0 is the next")));
  EXPECT_THAT([] { pair_timeline({}, {}, {}); }, ThrowsMessage<InvalidArgument>(HasSubstr("nothing to do")));
}

}  // namespace
}  // namespace dualpipe::planner
