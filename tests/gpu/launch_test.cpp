// Starts ranks on as many devices as there are: the tests of rank_test.cpp, and the language model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <regex>
#include <string>
#include <tuple>
#include <vector>

#include "launch/process.hpp"
#include "nccl/cuda.hpp"
#include "nccl/rank_device.hpp"

namespace dualpipe {
namespace {

using testing::Process;
using Command = std::vector<std::string>;

/// Why a test cannot run here; empty: it can.
std::string missing(int num_devices) {
  std::string why;
  const int devices = detail::cuda_device_count(why);
  if (devices >= num_devices) return "";
  return "needs " + std::to_string(num_devices) + " CUDA device" + (num_devices == 1 ? "" : "s") + ", there are " +
         std::to_string(devices) + (why.empty() ? "" : ": ") + why;
}

/// Where a program is: as it was built, or in the folder to which all have been moved (scripts/bundle).
std::string program(const std::string& built) {
  const char* folder = std::getenv("DUALPIPE_PROGRAMS");
  if (folder == nullptr) return built;
  return std::filesystem::path(folder) / std::filesystem::path(built).filename();
}

Command on_ranks(int num_ranks, const Command& ranks) {
  Command command = {program(DUALPIPE_RUN), "-n", std::to_string(num_ranks), "--"};
  command.insert(command.end(), ranks.begin(), ranks.end());
  return command;
}

Command under_torchrun(int num_ranks, const Command& ranks) {
  Command command = {program(TORCHRUN), "--standalone", "--nproc-per-node", std::to_string(num_ranks), "--no-python"};
  command.insert(command.end(), ranks.begin(), ranks.end());
  return command;
}

void expect_success(const Command& command, const std::vector<std::pair<std::string, std::string>>& environment = {}) {
  Process process(command, environment);
  const int exit_code = process.wait(std::chrono::seconds(300));
  EXPECT_EQ(exit_code, 0) << process.out() << process.err();
}

class GpuLaunch : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (const std::string why = missing(GetParam()); !why.empty()) GTEST_SKIP() << why;
  }
};

TEST_P(GpuLaunch, EveryRankTest) { expect_success(on_ranks(GetParam(), {program(GPU_RANK_TEST)})); }

TEST_P(GpuLaunch, EveryRankTestUnderTorchrun) {
  if (!std::filesystem::exists(program(TORCHRUN))) GTEST_SKIP() << "there is no " << program(TORCHRUN);
  expect_success(under_torchrun(GetParam(), {program(GPU_RANK_TEST)}));
}

INSTANTIATE_TEST_SUITE_P(Devices, GpuLaunch, ::testing::Values(2, 4, 8),
                         [](const auto& tested) { return std::to_string(tested.param); });

const std::vector<std::pair<std::string, std::string>> sharing = {{"DUALPIPE_TEST_SHARE_DEVICE", "1"},
                                                                  {"NCCL_MULTI_RANK_GPU_ENABLE", "1"}};

TEST(GpuLaunchShared, TwoRanksOnOneDevice) {
  if (const std::string why = missing(1); !why.empty()) GTEST_SKIP() << why;
  if (detail::nccl_version() < detail::first_version_to_share_devices)
    GTEST_SKIP() << "needs NCCL 2.30, this is " << detail::nccl_version_text(detail::nccl_version());
  expect_success(on_ranks(2, {program(GPU_RANK_TEST)}), sharing);
}

TEST(GpuLaunchShared, MoreRanksThanDevicesIsOneClearError) {
  if (const std::string why = missing(1); !why.empty()) GTEST_SKIP() << why;
  Process process(on_ranks(2, {program(GPU_RANK_TEST), "--gtest_filter=*Fp32*"}), {{"CUDA_VISIBLE_DEVICES", "0"}});
  EXPECT_EQ(process.wait(std::chrono::seconds(60)), 1);
  EXPECT_THAT(process.out() + process.err(), ::testing::HasSubstr("2 ranks on this host, but 1 CUDA device"));
}

#if defined(DUALPIPE_LM)
class GpuLanguageModel : public ::testing::TestWithParam<std::tuple<int, std::string>> {};

TEST_P(GpuLanguageModel, Learns) {
  const auto& [num_ranks, dtype] = GetParam();
  if (const std::string why = missing(num_ranks); !why.empty()) GTEST_SKIP() << why;
  // DualPipe needs two ranks; 1F1B makes do with one.
  Process process(on_ranks(num_ranks, {program(DUALPIPE_LM),
                                       "--device",
                                       "cuda",
                                       "--dtype",
                                       dtype,
                                       "--schedule",
                                       num_ranks == 1 ? "1f1b" : "dualpipe",
                                       "--minutes",
                                       "0",
                                       "--progress",
                                       "0",
                                       "--steps",
                                       "60",
                                       "--held-out",
                                       "1",
                                       "--sample",
                                       "20",
                                       "--microbatches",
                                       "20",
                                       "--trace",
                                       "",
                                       "--svg",
                                       ""}));
  ASSERT_EQ(process.wait(std::chrono::seconds(200)), 0) << process.out() << process.err();
  const std::string output = process.out();
  std::vector<double> losses;
  const std::regex line("step [0-9]+  loss ([0-9.]+)");
  for (std::sregex_iterator it(output.begin(), output.end(), line), end; it != end; ++it)
    losses.push_back(std::stod((*it)[1]));
  ASSERT_EQ(losses.size(), 60u) << output;
  EXPECT_NEAR(losses.front(), std::log(256), 0.2) << "it knows nothing yet";
  EXPECT_LT(losses.back(), 0.8 * losses.front());
}

INSTANTIATE_TEST_SUITE_P(Devices, GpuLanguageModel,
                         ::testing::Combine(::testing::Values(1, 2), ::testing::Values("float32", "bfloat16")),
                         [](const auto& tested) {
                           return std::to_string(std::get<0>(tested.param)) + "_" + std::get<1>(tested.param);
                         });
#endif

}  // namespace
}  // namespace dualpipe
