// Which rank dualpipe-run says has failed first.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "process.hpp"
#include "shell.hpp"

namespace dualpipe {
namespace {

using ::testing::HasSubstr;
using testing::Process;

struct Outcome {
  int exit_code = 0;
  std::string said;  ///< by the launcher, all of it
};

/// Four ranks, one of which fails; see failing_rank.cpp.
Outcome fail(const std::string& how, int culprit, int seed = 0, std::vector<std::string> flags = {}) {
  flags.insert(flags.begin(), {"-q", "-n", "4"});
  flags.insert(flags.end(), {"--", FAILING_RANK, how, std::to_string(culprit), std::to_string(seed)});
  Process run(testing::launcher(flags));
  Outcome outcome;
  outcome.exit_code = run.wait();
  std::istringstream lines(run.err());
  for (std::string line; std::getline(lines, line);)
    if (line.starts_with("dualpipe-run: ")) outcome.said += line + "\n";
  return outcome;
}

const std::vector<std::string> do_not_wait = {"--wait-before-term", "0.1", "--grace", "0.1"};

TEST(RunOrigin, IsTheRankThatThrew) {
  for (int seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    const int culprit = seed % 4;
    const Outcome outcome = fail("throws", culprit, seed);
    EXPECT_EQ(outcome.exit_code, 10 + culprit);
    EXPECT_EQ(outcome.said, detail::str("dualpipe-run: rank ", culprit, " failed first: the loss is gone; exit code ",
                                        10 + culprit, "\n"));
  }
}

TEST(RunOrigin, IsTheRankThatAborted) {
  const Outcome outcome = fail("aborts", 2);
  EXPECT_EQ(outcome.exit_code, 12);
  EXPECT_EQ(outcome.said, "dualpipe-run: rank 2 failed first: a bad token; exit code 12\n");
}

TEST(RunOrigin, IsTheRankThatWasKilled) {
  for (int seed = 0; seed < 5; ++seed) {
    const Outcome outcome = fail("killed", 3, seed);
    EXPECT_EQ(outcome.exit_code, 128 + SIGKILL);
    EXPECT_EQ(outcome.said, "dualpipe-run: rank 3 failed first: killed by SIGKILL (signal 9)\n");
  }
}

/// Were it to wait before it kills, the test would run out of time.
TEST(RunOrigin, IsTheRankThatWasStopped) {
  for (int seed = 0; seed < 5; ++seed) {
    const Outcome outcome = fail("stopped", 1, seed, {"--wait-before-term", "3600"});
    EXPECT_THAT(outcome.exit_code, ::testing::AnyOf(10, 12, 13)) << "that of the first rank that failed by itself";
    EXPECT_EQ(outcome.said, "dualpipe-run: rank 1 was stopped or hung; killed\n");
  }
}

TEST(RunOrigin, IsTheRankThatHung) {
  const Outcome outcome = fail("hangs", 1, 0, do_not_wait);
  EXPECT_THAT(outcome.exit_code, ::testing::AnyOf(10, 12, 13));
  EXPECT_EQ(outcome.said, "dualpipe-run: rank 1 was stopped or hung; killed\n");
}

TEST(RunOrigin, MayHangAfterItsReport) {
  const Outcome outcome = fail("throws-and-hangs", 1, 0, do_not_wait);
  EXPECT_THAT(outcome.exit_code, ::testing::AnyOf(10, 12, 13));
  EXPECT_EQ(outcome.said, "dualpipe-run: rank 1 failed first: the loss is gone; killed, as it did not end\n");
}

TEST(RunOrigin, MayHaveLeftInOrder) {
  const Outcome outcome = fail("left", 2);
  EXPECT_THAT(outcome.exit_code, ::testing::AnyOf(10, 11, 13));
  EXPECT_EQ(outcome.said, "dualpipe-run: rank 2 failed first: it ended with exit code 0 while others needed it\n");
}

TEST(RunOrigin, IsTheOnlyOneThatFails) {
  const Outcome outcome = fail("alone", 2, 0, do_not_wait);
  EXPECT_EQ(outcome.exit_code, 12);
  EXPECT_EQ(outcome.said, "dualpipe-run: rank 2 failed first: the loss is gone; exit code 12\n");
}

TEST(RunOrigin, MayBeOnAnotherNode) {
  const Outcome outcome =
      fail("throws", 5, 0, {"--nnodes", "2", "--node-rank", "0", "--rendezvous", "localhost:29513"});
  EXPECT_THAT(outcome.exit_code, ::testing::AllOf(::testing::Ge(10), ::testing::Le(13)));
  EXPECT_THAT(outcome.said, ::testing::MatchesRegex("dualpipe-run: rank 5 on node 1 failed first; rank [0-3] says: "
                                                    "receive from 5: failed because of rank 5\n"));
}

class TorchrunOrigin : public ::testing::TestWithParam<std::string> {};

/// torchrun looks for ranks that have ended ten times a second, and finds all of them together.
TEST_P(TorchrunOrigin, IsTheRootCause) {
  if (!std::filesystem::exists(TORCHRUN)) GTEST_SKIP() << "there is no " << TORCHRUN;
  Process run({TORCHRUN, "--nproc-per-node", "4", "--standalone", "--no-python", FAILING_RANK, GetParam(), "2"},
              {{"OMP_NUM_THREADS", "1"}});
  EXPECT_EQ(run.wait(std::chrono::seconds(100)), 1);
  const std::string text = run.err();
  const std::size_t cause = text.find("Root Cause (first observed failure):");
  ASSERT_NE(cause, std::string::npos) << text;
  EXPECT_THAT(text.substr(cause), HasSubstr("rank      : 2 (local_rank: 2)")) << text;
}

INSTANTIATE_TEST_SUITE_P(How, TorchrunOrigin, ::testing::Values("throws", "killed"),
                         [](const auto& how) { return how.param; });

/// No message can make the launcher misread a report, and nobody has to write one.
TEST(RunOrigin, IsTakenFromWellFormedReportsOnly) {
  for (const std::string text : {"", "{", "[]", "{\"message\": 3}", "null"}) {
    Process run(testing::shell(2, "printf '" + text + "' > $DUALPIPE_ERROR_FILE; exit $((RANK * 6))"));
    EXPECT_EQ(run.wait(), 6);
    EXPECT_THAT(run.err(), HasSubstr("rank 1 failed first: exit code 6"));
  }
}

}  // namespace
}  // namespace dualpipe
