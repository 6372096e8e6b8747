// Runs dualpipe-plan as a user does: a process with arguments, two outputs and an exit code.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>

#include "temporary_folder.hpp"

namespace dualpipe::planner {

namespace fs = std::filesystem;

inline std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return std::move(text).str();
}

struct Result {
  int code = -1;
  std::string out, err;
};

class PlanTool : public testing::Test {
 protected:
  /// Runs the tool in a folder of its own; `arguments` as a shell reads them.
  Result run(const std::string& arguments) const {
    const std::string command =
        "cd " + folder_.path().string() + " && " DUALPIPE_PLAN " " + arguments + " >stdout 2>stderr </dev/null";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read(folder_ / "stdout"), read(folder_ / "stderr")};
  }

  /// Standard output of a command that succeeds.
  std::string output(const std::string& arguments) const {
    const Result result = run(arguments);
    EXPECT_EQ(result.code, 0) << arguments << ": " << result.err;
    return result.out;
  }
  nlohmann::json json_of(const std::string& arguments) const {
    return nlohmann::json::parse(output(arguments + " --format json"));
  }
  double makespan(const std::string& arguments) const {
    return json_of("simulate " + arguments)["makespan"].get<double>();
  }

  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }

  /// Exit code 1 or 2, nothing on standard output, and one message that begins with the program's name.
  void expect_refused(const std::string& arguments, int code, const std::string& message) const {
    const Result result = run(arguments);
    EXPECT_EQ(result.code, code) << arguments;
    EXPECT_EQ(result.out, "") << arguments;
    EXPECT_THAT(result.err, testing::StartsWith("dualpipe-plan: ")) << arguments;
    EXPECT_THAT(result.err, testing::HasSubstr(message)) << arguments;
  }

  dualpipe::test::TemporaryFolder folder_;
};

}  // namespace dualpipe::planner
