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

/// All ranks end well, the last one after so many tests.
void expect_passed(int num_ranks, const std::string& filter, const std::string& tests) {
  const Outcome outcome = launch(num_ranks, filter);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output,
              ::testing::HasSubstr("[" + std::to_string(num_ranks - 1) + "] [  PASSED  ] " + tests + "."));
}

TEST(Launch, GradientsEqualOneProcessOnTwoRanks) {
  expect_passed(2, "Rank.Gradients*:Rank.Items*:Rank.DropoutSeeded*:Rank.Outputs*", "4 tests");
}

TEST(Launch, GradientsEqualOneProcessOnFourRanks) {
  expect_passed(4, "Rank.Gradients*:Rank.Items*:Rank.DropoutSeeded*:Rank.Outputs*", "4 tests");
}

TEST(Launch, RandomNumbersFollowFromASeed) {
  expect_passed(4, "Rank.AProcess*:Rank.DropoutOf*:Rank.ASeed*", "3 tests");
}

TEST(Launch, ReplicasTrainAsOneProcess) { expect_passed(4, "Rank.Replicas*", "1 test"); }

TEST(Launch, AStepIsOverEverywhereOrNowhere) { expect_passed(4, "Rank.AStepIsOver*", "1 test"); }

TEST(Launch, PipelinesAndFailuresLeaveNothing) { expect_passed(2, "Rank.PipelinesAndFailures*", "1 test"); }

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
