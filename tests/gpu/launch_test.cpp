// Starts rank_test.cpp on as many devices as there are.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "comm/nccl_cuda.hpp"
#include "launch/process.hpp"

namespace dualpipe {
namespace {

class GpuLaunch : public ::testing::TestWithParam<int> {};

TEST_P(GpuLaunch, EveryRankTest) {
  const int num_ranks = GetParam();
  std::string why;
  const int devices = detail::cuda_device_count(why);
  if (devices < num_ranks)
    GTEST_SKIP() << "needs " << num_ranks << " CUDA devices, there are " << devices << (why.empty() ? "" : ": ") << why;
  testing::Process process({DUALPIPE_RUN, "-n", std::to_string(num_ranks), "--", GPU_RANK_TEST});
  const int exit_code = process.wait(std::chrono::seconds(300));
  EXPECT_EQ(exit_code, 0) << process.out() << process.err();
}

INSTANTIATE_TEST_SUITE_P(Devices, GpuLaunch, ::testing::Values(2, 4, 8),
                         [](const auto& tested) { return std::to_string(tested.param); });

TEST(GpuLaunchShared, TwoRanksOnOneDevice) {
  std::string why;
  if (detail::cuda_device_count(why) < 1) GTEST_SKIP() << "no CUDA device: " << why;
  testing::Process process({DUALPIPE_RUN, "-n", "2", "--", "/usr/bin/env", "DUALPIPE_TEST_SHARE_DEVICE=1",
                            "NCCL_MULTI_RANK_GPU_ENABLE=1", GPU_RANK_TEST});
  const int exit_code = process.wait(std::chrono::seconds(300));
  EXPECT_EQ(exit_code, 0) << process.out() << process.err();
}

}  // namespace
}  // namespace dualpipe
