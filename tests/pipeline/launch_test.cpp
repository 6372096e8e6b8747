// Launches the rank tests as processes and reads what they say.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/planner/record.hpp"
#include "launch/process.hpp"
#include "temporary_folder.hpp"

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

TEST(Launch, PipelinesAndFailuresLeaveNothing) {
  const Outcome outcome = launch(2, "Rank.PipelinesAndFailures*");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, ::testing::HasSubstr("[1] [  PASSED  ] 1 test."));
}

TEST(Launch, ARankThatThrowsOutsideOfAStepIsNamed) {
  const Outcome outcome = launch(4, "Rank.OneThrowsOutside*");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
}

TEST(Launch, ARankThatThrowsInAStepIsNamedByTheRecords) {
  const test::TemporaryFolder folder;
  ::setenv("DUALPIPE_TEST_FOLDER", folder.path().c_str(), 1);
  const Outcome outcome = launch(4, "Rank.OneThrowsInAStep*");
  ::unsetenv("DUALPIPE_TEST_FOLDER");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  std::vector<planner::Record> records;
  for (const int rank : {0, 1, 2, 3})
    records.push_back(planner::from_record(detail::read_file(folder / ("rank-" + std::to_string(rank) + ".json"))));
  const planner::StragglerReport report = planner::find_straggler(records);
  EXPECT_THAT(report.ranks[2].now, ::testing::HasSubstr("1F5"));
  EXPECT_FALSE(report.ranks[2].waits);
}

TEST(Launch, AKilledRankEndsTheOthersWithItsName) {
  const Outcome outcome = launch(4, "Rank.OneIsKilled*");
  EXPECT_EQ(outcome.exit_code, 128 + 9) << outcome.output;
  for (const int survivor : {0, 1, 3})
    EXPECT_THAT(outcome.output, ::testing::HasSubstr("[" + std::to_string(survivor) + "] survived: "))
        << outcome.output;
}

TEST(Launch, TheLauncherNamesTheRankThatThrew) {
  const Outcome outcome = launch(4, "Rank.OneFails*");
  EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
  EXPECT_THAT(outcome.output,
              ::testing::ContainsRegex("dualpipe-run: rank 2 failed first: [^\n]*no such token[^\n]*; exit code 1\n"));
}

TEST(Launch, TheLauncherNamesTheRankThatWasStopped) {
  ::setenv("DUALPIPE_TEST_STOP", "1", 1);
  const Outcome outcome = launch(4, "Rank.OneFails*");
  ::unsetenv("DUALPIPE_TEST_STOP");
  EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
  EXPECT_THAT(outcome.output, ::testing::HasSubstr("dualpipe-run: rank 2 was stopped or hung; killed\n"));
}

}  // namespace
}  // namespace dualpipe
