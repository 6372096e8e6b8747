#include "dualpipe/planner/jitter.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::planner {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(Jitter, ASeedIsARun) {
  const Schedule schedule = make_schedule({"dualpipe", 4, 12});
  const auto run = [&](const Jitter& jitter) { return simulate_jitter(schedule, {.send = 0.1}, jitter); };
  const std::vector<double> first = run({.deviation = 0.1, .trials = 50, .seed = 1});
  EXPECT_EQ(first, run({.deviation = 0.1, .trials = 50, .seed = 1}));
  EXPECT_NE(first, run({.deviation = 0.1, .trials = 50, .seed = 2}));
  EXPECT_TRUE(std::is_sorted(first.begin(), first.end()));
  EXPECT_EQ(first.size(), 50U);
  for (const double makespan : run({.deviation = 0, .trials = 3}))
    EXPECT_EQ(makespan, simulate_makespan(schedule, {.send = 0.1}));
}

TEST(Jitter, FactorsHaveTheirMeanAndDeviation) {
  // A single op: the makespans are the factors.
  const Schedule schedule = from_csv("0F0\n");
  for (const double deviation : {0.05, 0.1, 0.5}) {
    const int trials = 40000;
    const std::vector<double> found = simulate_jitter(schedule, {}, {deviation, trials, 5});
    double mean = 0, square = 0;
    for (const double value : found) {
      EXPECT_GT(value, 0);
      mean += value / trials;
      square += value * value / trials;
    }
    // Five standard errors.
    EXPECT_NEAR(mean, 1, 5 * deviation / std::sqrt(trials)) << "seed 5";
    EXPECT_NEAR(std::sqrt(square - mean * mean), deviation, 0.05 * deviation) << "seed 5";
    // Log-normal: the median is 1 / sqrt(1 + deviation^2).
    EXPECT_NEAR(percentile(found, 50), 1 / std::sqrt(1 + deviation * deviation), 0.02) << "seed 5";
  }
}

TEST(Jitter, RefusesWithTheValue) {
  const Schedule schedule = make_schedule({"1f1b", 2, 4});
  const auto with = [&](const Jitter& jitter) {
    return [&schedule, jitter] { simulate_jitter(schedule, {}, jitter); };
  };
  EXPECT_THAT(with({.deviation = -0.1}), ThrowsMessage<InvalidArgument>(HasSubstr("got -0.1")));
  EXPECT_THAT(with({.deviation = std::nan("")}), ThrowsMessage<InvalidArgument>(HasSubstr("got nan")));
  EXPECT_THAT(with({.trials = 0}), ThrowsMessage<InvalidArgument>(HasSubstr("trials must be from 1 to")));
  EXPECT_THAT(with({.deviation = 1e300}), ThrowsMessage<InvalidArgument>(HasSubstr("1e+300")));
}

TEST(Percentile, InterpolatesBetweenNeighbours) {
  const std::vector<double> values{1, 2, 4, 8};
  EXPECT_EQ(percentile(values, 0), 1);
  EXPECT_EQ(percentile(values, 100), 8);
  EXPECT_EQ(percentile(values, 50), 3);
  EXPECT_DOUBLE_EQ(percentile(values, 90), 4 + 0.7 * 4);
  EXPECT_EQ(percentile({7}, 95), 7);
  EXPECT_THROW(percentile({}, 50), InvalidArgument);
  EXPECT_THROW(percentile(values, 101), InvalidArgument);
}

}  // namespace
}  // namespace dualpipe::planner
