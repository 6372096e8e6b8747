// Launches the rank tests as processes and reads what they say.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <string>

namespace {

struct Outcome {
  int exit_code = 0;
  std::string output;
};

Outcome launch(int num_ranks, const std::string& filter) {
  const std::string command = std::string(DUALPIPE_RUN) + " -n " + std::to_string(num_ranks) + " -- " + RANK_TEST +
                              " --gtest_filter=" + filter + " 2>&1";
  Outcome outcome;
  FILE* pipe = popen(command.c_str(), "r");
  EXPECT_NE(pipe, nullptr) << command;
  if (pipe == nullptr) return outcome;
  std::array<char, 4096> buffer;
  for (std::size_t n; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) outcome.output.append(buffer.data(), n);
  const int status = pclose(pipe);
  outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

TEST(Launch, GradientsEqualOneProcessOnTwoRanks) {
  const Outcome outcome = launch(2, "Rank.Gradients*:Rank.Dropout*");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, ::testing::HasSubstr("[1] [  PASSED  ] 2 tests."));
}

TEST(Launch, GradientsEqualOneProcessOnFourRanks) {
  const Outcome outcome = launch(4, "Rank.Gradients*:Rank.Dropout*");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, ::testing::HasSubstr("[3] [  PASSED  ] 2 tests."));
}

TEST(Launch, AKilledRankEndsTheOthersWithItsName) {
  const Outcome outcome = launch(4, "Rank.OneIsKilled*");
  EXPECT_EQ(outcome.exit_code, 128 + 9) << outcome.output;
  for (const int survivor : {0, 1, 3})
    EXPECT_THAT(outcome.output, ::testing::HasSubstr("[" + std::to_string(survivor) + "] survived: "))
        << outcome.output;
}

}  // namespace
