// The language model as its users start it: it learns, every kind of schedule gives the same losses, and wrong input is
// one clear error.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <regex>
#include <string>
#include <vector>

#include "launch/process.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Process;

class LanguageModel : public ::testing::Test {
 protected:
  void SetUp() override {
    std::ofstream text(folder / "text.txt");
    for (int i = 0; i < 2000; ++i) text << "int add" << i % 7 << "(int a, int b) { return a + b; }\n";
  }

  std::filesystem::path write(const std::string& name, const std::string& text) const {
    std::ofstream(folder / name) << text;
    return folder / name;
  }
  /// A small model and text, a few steps, unless the flags say otherwise.
  std::vector<std::string> command(int num_ranks, const std::vector<std::string>& flags) const {
    std::vector<std::string> all = {DUALPIPE_RUN, "-n", std::to_string(num_ranks), "--", DUALPIPE_LM};
    const std::vector<std::pair<std::string, std::string>> defaults = {{"--layers", "6"},
                                                                       {"--width", "16"},
                                                                       {"--heads", "2"},
                                                                       {"--context", "16"},
                                                                       {"--minutes", "0"},
                                                                       {"--progress", "0"},
                                                                       {"--steps", "4"},
                                                                       {"--held-out", "1"},
                                                                       {"--sample", "20"},
                                                                       {"--text", (folder / "text.txt").string()},
                                                                       {"--svg", (folder / "run.svg").string()},
                                                                       {"--trace", (folder / "run.json").string()}};
    for (const auto& [name, value] : defaults)
      if (std::find(flags.begin(), flags.end(), name) == flags.end()) all.insert(all.end(), {name, value});
    all.insert(all.end(), flags.begin(), flags.end());
    return all;
  }
  /// Exit code not zero, and the text of all ranks.
  std::string failure(int num_ranks, const std::vector<std::string>& flags) const {
    Process process(command(num_ranks, flags));
    const int code = process.wait();
    EXPECT_NE(code, 0);
    EXPECT_NE(code, Process::kTimedOut);
    return process.out() + process.err();
  }

  dualpipe::test::TemporaryFolder folder;
};

std::vector<std::string> losses(const std::string& output) {
  std::vector<std::string> found;
  const std::regex line("step [0-9]+  loss ([0-9.]+)");
  for (std::sregex_iterator it(output.begin(), output.end(), line), end; it != end; ++it) found.push_back((*it)[1]);
  return found;
}

TEST_F(LanguageModel, EveryScheduleTrainsTheSameModel) {
  std::vector<std::string> first;
  for (const std::string kind : {"dualpipe", "dualpipev", "1f1b", "zb1p"}) {
    Process process(command(2, {"--schedule", kind, "--microbatches", "4"}));
    ASSERT_EQ(process.wait(), 0) << process.out() << process.err();
    const std::string output = process.out();
    EXPECT_THAT(output, AllOf(HasSubstr(kind + " on 2 ranks"), HasSubstr("held-out loss:"), HasSubstr("sample"),
                              HasSubstr("hidden under compute")));
    EXPECT_EQ(losses(output).size(), 4u) << output;
    if (first.empty()) first = losses(output);
    EXPECT_EQ(losses(output), first) << kind;
    EXPECT_EQ(first[0].substr(0, 3), "5.5");  // ln 256: it knows nothing yet
  }
  EXPECT_GT(std::filesystem::file_size(folder / "run.svg"), 1000u);
  Process report({DUALPIPE_PLAN, "report", (folder / "run.json").string()});
  EXPECT_EQ(report.wait(), 0) << report.err();
  EXPECT_THAT(report.out(), HasSubstr("makespan"));
}

TEST_F(LanguageModel, LearnsInBfloat16) {
  std::vector<std::string> first;
  for (const std::string dtype : {"float32", "bfloat16"}) {
    Process process(command(2, {"--dtype", dtype, "--steps", "30", "--microbatches", "4"}));
    ASSERT_EQ(process.wait(), 0) << process.out() << process.err();
    const std::vector<std::string> lines = losses(process.out());
    ASSERT_EQ(lines.size(), 30u) << process.out();
    EXPECT_LT(std::stod(lines.back()), 0.8 * std::stod(lines.front())) << dtype;
    if (first.empty()) first = lines;
    EXPECT_NEAR(std::stod(lines.front()), std::stod(first.front()), 0.01) << "losses are float32";
    EXPECT_NEAR(std::stod(lines.back()), std::stod(first.back()), 0.3) << dtype;
    EXPECT_EQ(lines == first, dtype == "float32") << "parameters are not";
  }
}

TEST_F(LanguageModel, GpuRanksWithoutAGpuAreOneClearError) {
  const auto text_of = [&](const std::vector<std::string>& flags) {
    Process process(command(2, flags), {{"CUDA_VISIBLE_DEVICES", "-1"}});
    EXPECT_EQ(process.wait(), 1);
    return process.err();
  };
  EXPECT_THAT(
      text_of({"--device", "cuda", "--microbatches", "4"}),
      AllOf(HasSubstr("--device cuda"), HasSubstr(DUALPIPE_LM_HAS_NCCL ? "no CUDA device" : "built without NCCL")));
  EXPECT_THAT(text_of({"--device", "cuda", "--link-latency-ms", "1"}), HasSubstr("for CPU ranks"));
  EXPECT_THAT(text_of({"--device", "gpu"}), AllOf(HasSubstr("gpu"), HasSubstr("cuda")));
  EXPECT_THAT(text_of({"--dtype", "float16"}), AllOf(HasSubstr("float16"), HasSubstr("bfloat16")));
}

TEST_F(LanguageModel, CpuRanksLoadNoCuda) {
  Process process({DUALPIPE_LM, "--help"}, {{"LD_DEBUG", "libs"}});
  ASSERT_EQ(process.wait(), 0) << process.err();
  EXPECT_THAT(process.err(),
              AllOf(HasSubstr("libtorch_cpu"), Not(HasSubstr("libtorch_cuda")), Not(HasSubstr("libnccl"))));
}

TEST_F(LanguageModel, RunsFromAConfigurationFile) {
  const auto config = write("run.json", R"({"num_ranks": 2, "num_micro_batches": 6, "schedule": "1f1b"})");
  Process process(command(2, {"--config", config.string()}));
  ASSERT_EQ(process.wait(), 0) << process.out() << process.err();
  EXPECT_THAT(process.out(), HasSubstr("1f1b on 2 ranks, 2 stages, 6 micro-batches"));
}

TEST_F(LanguageModel, WrongInputIsOneClearError) {
  EXPECT_THAT(failure(3, {"--microbatches", "8"}), AllOf(HasSubstr("even number of ranks"), HasSubstr("3")));
  EXPECT_THAT(failure(2, {"--microbatches", "5"}), AllOf(HasSubstr("even"), HasSubstr("5")));
  EXPECT_THAT(failure(2, {"--schedule", "dualpip"}), HasSubstr("dualpip"));
  EXPECT_THAT(failure(2, {"--text", "/nowhere/at/all"}), HasSubstr("/nowhere/at/all"));
  EXPECT_THAT(failure(2, {"--config", write("key.json", R"({"num_microbatches": 4})").string()}),
              AllOf(HasSubstr("unknown key"), HasSubstr("num_micro_batches")));
  EXPECT_THAT(failure(2, {"--config", write("type.json", R"({"num_micro_batches": "4"})").string()}),
              HasSubstr("must be an integer"));
  EXPECT_THAT(failure(2, {"--config", write("ranks.json", R"({"num_ranks": 8})").string()}),
              AllOf(HasSubstr("8 ranks"), HasSubstr("2 were started")));
  EXPECT_THAT(failure(2, {"--layers", "zero"}), HasSubstr("--layers"));
}

TEST_F(LanguageModel, AWrongEnvironmentIsOneClearError) {
  const auto alone = [&](const std::vector<std::pair<std::string, std::string>>& variables) {
    Process process({DUALPIPE_LM, "--text", (folder / "text.txt").string()}, variables);
    EXPECT_EQ(process.wait(std::chrono::seconds(20)), 1);
    return process.err();
  };
  EXPECT_THAT(alone({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", ""}}), HasSubstr("MASTER_PORT"));
  EXPECT_THAT(alone({{"RANK", "2"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "29511"}}),
              AllOf(HasSubstr("RANK"), HasSubstr("2")));
  EXPECT_THAT(alone({{"RANK", "first"}, {"WORLD_SIZE", "2"}}), HasSubstr("first"));
}

}  // namespace
}  // namespace dualpipe
