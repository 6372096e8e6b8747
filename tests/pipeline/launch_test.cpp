// Launches the rank tests as processes and reads what they say.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "launch/process.hpp"

namespace dualpipe {
namespace {

struct Outcome {
  int exit_code = 0;
  std::string output;
};

Outcome launch(int num_ranks, const std::string& filter) {
  testing::Process process(
      {DUALPIPE_RUN, "-n", std::to_string(num_ranks), "--", RANK_TEST, "--gtest_filter=" + filter});
  const int exit_code = process.wait(std::chrono::seconds(100));
  return {exit_code, process.out() + process.err()};
}

TEST(Launch, GradientsEqualOneProcessOnTwoRanks) {
  const Outcome outcome = launch(2, "Rank.Gradients*:Rank.Dropout*:Rank.Outputs*");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, ::testing::HasSubstr("[1] [  PASSED  ] 3 tests."));
}

TEST(Launch, GradientsEqualOneProcessOnFourRanks) {
  const Outcome outcome = launch(4, "Rank.Gradients*:Rank.Dropout*:Rank.Outputs*");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, ::testing::HasSubstr("[3] [  PASSED  ] 3 tests."));
}

TEST(Launch, ReplicasTrainAsOneProcess) {
  const Outcome outcome = launch(4, "Rank.Replicas*");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, ::testing::HasSubstr("[3] [  PASSED  ] 1 test."));
}

TEST(Launch, AStepIsOverEverywhereOrNowhere) {
  const Outcome outcome = launch(4, "Rank.AStepIsOver*");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, ::testing::HasSubstr("[3] [  PASSED  ] 1 test."));
}

TEST(Launch, AKilledRankEndsTheOthersWithItsName) {
  const Outcome outcome = launch(4, "Rank.OneIsKilled*");
  EXPECT_EQ(outcome.exit_code, 128 + 9) << outcome.output;
  for (const int survivor : {0, 1, 3})
    EXPECT_THAT(outcome.output, ::testing::HasSubstr("[" + std::to_string(survivor) + "] survived: "))
        << outcome.output;
}

}  // namespace
}  // namespace dualpipe
