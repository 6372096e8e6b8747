// Launches the tests of ranks that do different things.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "launch/process.hpp"

namespace dualpipe {
namespace {

TEST(LaunchCalls, RanksThatDoDifferentThingsAreNamed) {
  testing::Process process({DUALPIPE_RUN, "-n", "4", "--", RANK_TEST, "--gtest_filter=RankCalls.*"});
  EXPECT_EQ(process.wait(std::chrono::seconds(100)), 0) << process.out() << process.err();
  EXPECT_THAT(process.out(), ::testing::HasSubstr("[3] [  PASSED  ] 2 tests."));
}

}  // namespace
}  // namespace dualpipe
