#include "dualpipe/launch/failure.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "dualpipe/error.hpp"
#include "launch/failure_report.hpp"
#include "temporary_folder.hpp"

namespace dualpipe {
namespace {

class ReportFailure : public ::testing::Test {
 protected:
  std::string report(const World& world, const std::exception& error) {
    ::testing::internal::CaptureStderr();
    report_failure(world, error);
    return ::testing::internal::GetCapturedStderr();
  }
  std::string report(const World& world, const std::string& message) {
    return report(world, std::runtime_error(message));
  }

  static std::string text_of(const std::filesystem::path& path) {
    std::ifstream in(path);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  dualpipe::test::TemporaryFolder folder_;
};

TEST_F(ReportFailure, NamesTheRank) {
  World world;
  world.rank = 3;
  EXPECT_EQ(report(world, "the loss is gone"), "rank 3: the loss is gone\n");
  EXPECT_EQ(report(world, "rank 3: send to rank 2: failed"), "rank 3: send to rank 2: failed\n") << "once is enough";
  EXPECT_EQ(report(world, "rank 31: failed"), "rank 3: rank 31: failed\n");
}

/// As where World::from_env() has thrown.
TEST_F(ReportFailure, OfAWorldThatWasNotReadIsThatOfTheLaunchersRank) {
  const std::string file = (folder_ / "error.json").string();
  ::setenv("RANK", "3", 1);
  ::setenv("DUALPIPE_ERROR_FILE", file.c_str(), 1);
  EXPECT_EQ(report(World(), "MASTER_PORT='x'"), "rank 3: MASTER_PORT='x'\n");
  ::unsetenv("DUALPIPE_ERROR_FILE");
  ::unsetenv("RANK");
  const auto failure = detail::failure_report_from(text_of(file));
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->rank, 3);
  EXPECT_EQ(failure->origin, 3);
  EXPECT_EQ(failure->message, "rank 3: MASTER_PORT='x'");
}

TEST_F(ReportFailure, WritesWhatTorchrunReads) {
  World world;
  world.rank = 1;
  world.error_file = (folder_ / "error.json").string();
  report(world, "quotes \" and\nlines and bytes \xff");
  std::ifstream in(world.error_file);
  const nlohmann::json file = nlohmann::json::parse(in);
  EXPECT_EQ(file.at("message").at("message").get<std::string>(), "rank 1: quotes \" and\nlines and bytes \xEF\xBF\xBD");
  // torchrun turns this text into a whole number of seconds.
  EXPECT_GT(std::stoll(file.at("message").at("extraInfo").at("timestamp").get<std::string>()), 1'500'000'000);
  EXPECT_EQ(
      std::distance(std::filesystem::directory_iterator(std::filesystem::path(world.error_file).parent_path()), {}), 1)
      << "the draft must be gone";
}

/// The message and the seconds that torchrun finds in a file.
std::pair<std::string, long long> as_torchrun_reads(const std::string& text) {
  const nlohmann::json message = nlohmann::json::parse(text).at("message");
  return {message.at("message").get<std::string>(),
          std::stoll(message.at("extraInfo").at("timestamp").get<std::string>())};
}

TEST_F(ReportFailure, IsEarlierForTorchrunWhereItBegan) {
  World world;
  world.rank = 1;
  world.error_file = (folder_ / "error.json").string();
  EXPECT_EQ(report(world, CommError(3, "receive from 3", "rank 1: receive from 3: failed")),
            "rank 1: receive from 3: failed\n");
  const auto [consequence, consequence_time] = as_torchrun_reads(text_of(world.error_file));
  EXPECT_EQ(consequence, "rank 1: receive from 3: failed");
  for (const int origin : {1, -1}) {
    report(world, CommError(origin, "receive from 3", "rank 1: gone"));
    const auto [cause, time] = as_torchrun_reads(text_of(world.error_file));
    EXPECT_EQ(cause, "rank 1: gone");
    EXPECT_LT(time, consequence_time) << "although it came later";
  }
}

TEST_F(ReportFailure, TellsTheLauncherWhereItBegan) {
  World world;
  world.rank = 1;
  world.error_file = (folder_ / "error.json").string();
  report(world, CommError(3, "receive from 3", "rank 1: receive from 3: failed"));
  const auto consequence = detail::failure_report_from(text_of(world.error_file));
  ASSERT_TRUE(consequence);
  EXPECT_EQ(consequence->message, "rank 1: receive from 3: failed");
  EXPECT_EQ(consequence->rank, 1);
  EXPECT_EQ(consequence->origin, 3);
  EXPECT_EQ(consequence->operation, "receive from 3");
  report(world, "the loss is gone");
  const auto cause = detail::failure_report_from(text_of(world.error_file));
  ASSERT_TRUE(cause);
  EXPECT_EQ(cause->message, "rank 1: the loss is gone");
  EXPECT_EQ(cause->origin, 1);
  EXPECT_EQ(cause->operation, "");
  EXPECT_GE(cause->time_ns, consequence->time_ns);
  EXPECT_GT(cause->time_ns, 1'500'000'000'000'000'000);
}

TEST_F(ReportFailure, WritesThroughNoLinkThatWasPlacedBeforehand) {
  std::ofstream(folder_ / "precious") << "unchanged";
  World world;
  world.error_file = (folder_ / "error.json").string();
  for (const char* link : {"error.json", "error.json.tmp"})
    std::filesystem::create_symlink(folder_ / "precious", folder_ / link);
  EXPECT_EQ(report(world, "the loss is gone"), "rank 0: the loss is gone\n");
  EXPECT_EQ(text_of(folder_ / "precious"), "unchanged");
  EXPECT_FALSE(std::filesystem::is_symlink(folder_ / "error.json"));
  EXPECT_THAT(text_of(folder_ / "error.json"), ::testing::HasSubstr("the loss is gone"));
}

TEST_F(ReportFailure, SaysWhenTheFileCannotBeWritten) {
  World world;
  world.error_file = (folder_ / "missing/error.json").string();
  EXPECT_THAT(
      report(world, "first things first"),
      ::testing::AllOf(::testing::StartsWith("rank 0: first things first\n"), ::testing::HasSubstr(world.error_file)));
}

}  // namespace
}  // namespace dualpipe
