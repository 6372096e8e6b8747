#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "launch/process.hpp"

namespace dualpipe::test {

/// An example as its users start it, with a small text to learn from.
class ExampleProgram : public ::testing::Test {
 protected:
  using Flags = std::vector<std::string>;
  using Defaults = std::vector<std::pair<std::string, std::string>>;

  /// @param defaults  flags that a command has unless it sets them itself: a small model.
  ExampleProgram(std::string program, Defaults defaults)
      : program_(std::move(program)), defaults_(std::move(defaults)) {
    defaults_.insert(defaults_.end(), {{"--width", "16"},
                                       {"--heads", "2"},
                                       {"--context", "16"},
                                       {"--minutes", "0"},
                                       {"--progress", "0"},
                                       {"--held-out", "1"},
                                       {"--text", (folder / "text.txt").string()},
                                       {"--svg", (folder / "run.svg").string()},
                                       {"--trace", (folder / "run.json").string()}});
    std::ofstream text(folder / "text.txt");
    for (int i = 0; i < 2000; ++i) text << "int add" << i % 7 << "(int a, int b) { return a + b; }\n";
  }

  Flags command(int num_ranks, const Flags& flags) const {
    Flags all = {DUALPIPE_RUN, "-n", std::to_string(num_ranks), "--", program_};
    for (const auto& [name, value] : defaults_)
      if (std::find(flags.begin(), flags.end(), name) == flags.end()) all.insert(all.end(), {name, value});
    all.insert(all.end(), flags.begin(), flags.end());
    return all;
  }
  /// Standard output of ranks that end in order.
  std::string output(int num_ranks, const Flags& flags) const {
    testing::Process process(command(num_ranks, flags));
    EXPECT_EQ(process.wait(), 0) << process.out() << process.err();
    return process.out();
  }
  /// The text of all ranks, which end with an exit code that is not zero.
  std::string failure(int num_ranks, const Flags& flags) const {
    testing::Process process(command(num_ranks, flags));
    const int code = process.wait();
    EXPECT_NE(code, 0);
    EXPECT_NE(code, testing::Process::kTimedOut);
    return process.out() + process.err();
  }
  /// Expects that dualpipe-plan reads the trace of the last run.
  void expect_trace_is_reported() const {
    testing::Process report({DUALPIPE_PLAN, "report", (folder / "run.json").string()});
    EXPECT_EQ(report.wait(), 0) << report.err();
    EXPECT_THAT(report.out(), ::testing::HasSubstr("makespan"));
  }

  TemporaryFolder folder;

 private:
  std::string program_;
  Defaults defaults_;
};

}  // namespace dualpipe::test
