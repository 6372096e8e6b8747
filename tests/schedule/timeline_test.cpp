#include "dualpipe/schedule/timeline.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string_view>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace {

Interval compute(int rank, std::string_view step, double begin, double end) {
  return {rank, Lane::compute, parse_step(step), begin, end};
}

TEST(Report, CountsFromTheFirstBeginToTheLastEnd) {
  const Timeline timeline{
      .name = "t", .num_ranks = 3, .intervals = {compute(0, "0F0", 10, 12), compute(1, "1F0", 13, 17)}};
  const Report result = report(timeline);
  EXPECT_EQ(result.makespan, 7);
  ASSERT_EQ(result.ranks.size(), 3U);
  EXPECT_EQ(result.ranks[0].busy, 2);
  EXPECT_EQ(result.ranks[0].bubble, 5);
  EXPECT_EQ(result.ranks[1].busy, 4);
  EXPECT_EQ(result.ranks[1].bubble, 3);
  EXPECT_EQ(result.ranks[2].busy, 0);
  EXPECT_EQ(result.ranks[2].bubble, 7);
  EXPECT_EQ(result.ranks[1].rank, 1);
}

TEST(Report, CommunicationIsTheUnionOfBothLanesAndHiddenWhatLiesUnderCompute) {
  const Step step = parse_step("0F0");
  const Timeline timeline{.name = "t",
                          .num_ranks = 1,
                          .intervals = {{0, Lane::send, step, 1, 3},
                                        {0, Lane::receive, step, 2, 5},
                                        {0, Lane::receive, step, 7, 9},
                                        {0, Lane::collective, step, 20, 30},
                                        compute(0, "0F0", 0, 4),
                                        compute(0, "0F1", 4, 4.5),
                                        compute(0, "0F2", 8, 10)}};
  const Report result = report(timeline);
  EXPECT_EQ(result.makespan, 10);
  EXPECT_EQ(result.ranks[0].communication, 4 + 2);
  EXPECT_EQ(result.ranks[0].hidden, 3.5 + 1);
}

TEST(Report, PeakActivationsFollowTheOrderOfSteps) {
  Timeline timeline{.name = "t",
                    .num_ranks = 1,
                    .intervals = {compute(0, "0F0", 0, 1), compute(0, "0F1", 1, 2),
                                  compute(0, "(0F2;0B0)OVERLAP_F_B", 2, 5),  // three are held in it
                                  compute(0, "0I1", 5, 6), compute(0, "0W1", 6, 7), compute(0, "0B2", 7, 9)}};
  EXPECT_EQ(report(timeline).ranks[0].peak_activations, 3);
  // The order of the list does not matter where the clock tells.
  std::reverse(timeline.intervals.begin(), timeline.intervals.end());
  EXPECT_EQ(report(timeline).ranks[0].peak_activations, 3);
}

TEST(Report, StepsWithoutDurationKeepTheOrderOfTheList) {
  const Timeline timeline{.name = "t",
                          .num_ranks = 1,
                          .intervals = {compute(0, "0F0", 0, 0), compute(0, "0B0", 0, 0), compute(0, "0F1", 0, 0),
                                        compute(0, "0B1", 0, 0)}};
  EXPECT_EQ(report(timeline).ranks[0].peak_activations, 1);
  EXPECT_EQ(report(timeline).makespan, 0);
}

TEST(Report, EmptyTimelines) {
  EXPECT_EQ(report({}).makespan, 0);
  EXPECT_TRUE(report({}).ranks.empty());
  EXPECT_EQ(report({.name = "t", .num_ranks = 2, .intervals = {}}).ranks.size(), 2U);
}

TEST(Report, RefusesARankThatTheTimelineLacks) {
  const Timeline timeline{.name = "t", .num_ranks = 2, .intervals = {compute(2, "0F0", 0, 1)}};
  EXPECT_THAT([&] { report(timeline); },
              testing::ThrowsMessage<InvalidArgument>(testing::HasSubstr("rank 2 in a timeline of 2 ranks")));
}

}  // namespace
}  // namespace dualpipe
