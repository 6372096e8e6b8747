// The language model as its users start it: it learns, every kind of schedule gives the same losses, and wrong input is
// one clear error.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <string>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "examples/example_program.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Process;

class LanguageModel : public test::ExampleProgram {
 protected:
  LanguageModel() : ExampleProgram(DUALPIPE_LM, {{"--layers", "6"}, {"--steps", "4"}, {"--sample", "20"}}) {}

  std::filesystem::path write(const std::string& name, const std::string& text) const {
    std::ofstream(folder / name) << text;
    return folder / name;
  }
};

std::vector<std::string> losses(const std::string& output) {
  std::vector<std::string> found;
  const std::regex line("step [0-9]+  loss ([0-9.]+)");
  for (std::sregex_iterator it(output.begin(), output.end(), line), end; it != end; ++it) found.push_back((*it)[1]);
  return found;
}

/// The part of a line of metrics that follows from the seed.
std::vector<std::string> metrics(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::vector<std::string> found;
  for (std::string line; std::getline(file, line);) found.push_back(line.substr(0, line.find(",\"tokens_per_second")));
  return found;
}

/// Paths below a checkpoint, and the bytes of weights and optimizer states there.
std::map<std::string, std::string> files_of(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    if (entry.path().filename().string().starts_with("stage-") || entry.path().parent_path().filename() == "optimizer")
      files[std::filesystem::relative(entry.path(), folder)] = detail::read_file(entry.path());
  return files;
}

TEST_F(LanguageModel, EveryScheduleTrainsTheSameModel) {
  std::vector<std::string> first;
  for (const std::string kind : {"dualpipe", "dualpipev", "1f1b", "zb1p"}) {
    Flags flags{"--schedule", kind, "--microbatches", "4"};
    if (kind == "1f1b") flags.insert(flags.end(), {"--partition", "2,6"});
    if (kind == "zb1p") flags.insert(flags.end(), {"--partition", "embedding:block4,block5:norm_head"});
    const std::string text = output(2, flags);
    EXPECT_THAT(text, AllOf(HasSubstr(kind + " on 2 ranks"), HasSubstr("held-out loss:"), HasSubstr("sample"),
                            HasSubstr("hidden under compute")));
    ASSERT_EQ(losses(text).size(), 4u) << text;
    if (first.empty()) first = losses(text);
    EXPECT_EQ(losses(text), first) << kind;
    EXPECT_EQ(first[0].substr(0, 3), "5.5");  // ln 256: it knows nothing yet
  }
  EXPECT_GT(std::filesystem::file_size(folder / "run.svg"), 1000u);
  expect_trace_is_reported();
}

TEST_F(LanguageModel, TwoPipelinesTrainTheModelOfOne) {
  const std::vector<std::string> one = losses(output(2, {"--microbatches", "8"}));
  const std::string text = output(4, {"--data-parallel", "2", "--microbatches", "4"});
  const std::vector<std::string> two = losses(text);
  EXPECT_THAT(text, HasSubstr("2 pipelines side by side"));
  ASSERT_EQ(one.size(), 4u);
  ASSERT_EQ(two.size(), one.size()) << text;
  for (std::size_t i = 0; i < one.size(); ++i)
    EXPECT_NEAR(std::stod(two[i]), std::stod(one[i]), 1.5e-3) << "step " << i;
}

TEST_F(LanguageModel, AShardedOptimizerTrainsTheSameModel) {
  const Flags flags{"--data-parallel", "2", "--microbatches", "4"};
  Flags sharded = flags;
  sharded.push_back("--shard-optimizer");
  const std::vector<std::string> expected = losses(output(4, flags));
  ASSERT_EQ(expected.size(), 4u);
  EXPECT_EQ(losses(output(4, sharded)), expected);
}

TEST_F(LanguageModel, LearnsInBfloat16) {
  std::vector<std::string> first;
  for (const std::string dtype : {"float32", "bfloat16"}) {
    const std::string text = output(2, {"--dtype", dtype, "--steps", "30", "--microbatches", "4"});
    const std::vector<std::string> lines = losses(text);
    ASSERT_EQ(lines.size(), 30u) << text;
    EXPECT_LT(std::stod(lines.back()), 0.8 * std::stod(lines.front())) << dtype;
    if (first.empty()) first = lines;
    EXPECT_NEAR(std::stod(lines.front()), std::stod(first.front()), 0.01) << "losses are float32";
    EXPECT_NEAR(std::stod(lines.back()), std::stod(first.back()), 0.3) << dtype;
    EXPECT_EQ(lines == first, dtype == "float32") << "parameters are not";
  }
}

TEST_F(LanguageModel, ALossThatIsNoNumberEndsTheRun) {
  const std::string text = failure(2, {"--lr", "1e6", "--microbatches", "4"});
  EXPECT_THAT(text, AllOf(HasSubstr("step 2 is not finite: the loss of micro-batch "), Not(HasSubstr("loss -nan")),
                          Not(HasSubstr("loss nan"))));
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
  const auto config = write("run.json", R"({"num_ranks": 2, "num_micro_batches": 6, "schedule": "1f1b", "seed": 5})");
  const std::string text = output(2, {"--config", config.string()});
  EXPECT_THAT(text, HasSubstr("1f1b on 2 ranks, 2 stages, 6 micro-batches"));
  EXPECT_EQ(losses(output(2, {"--schedule", "1f1b", "--microbatches", "6", "--seed", "5"})), losses(text));
}

TEST_F(LanguageModel, GoesOnFromItsLastCheckpoint) {
  const auto flags = [&](const std::string& name, const std::string& steps, const Flags& more) {
    Flags all{"--microbatches", "4",
              "--steps",        steps,
              "--checkpoint",   (folder / name).string(),
              "--metrics",      (folder / (name + ".jsonl")).string()};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  const auto lines = [&](const std::string& name) { return metrics(folder / (name + ".jsonl")); };
  output(2, flags("whole", "6", {}));
  ASSERT_EQ(lines("whole").size(), 6u);

  output(2, flags("parts", "6", {"--checkpoint-every", "2"}));
  std::filesystem::remove_all(folder / "parts" / "step-00000006");  // as if it had been killed after its fifth step
  EXPECT_THAT(failure(2, flags("parts", "6", {})), AllOf(HasSubstr("parts is not empty"), HasSubstr("--resume")));
  const std::string resumed = output(2, flags("parts", "6", {"--resume"}));
  EXPECT_THAT(resumed, AllOf(HasSubstr("goes on after step 4"), HasSubstr("step 6")));
  EXPECT_EQ(losses(resumed).size(), 2u);
  EXPECT_EQ(lines("parts"), lines("whole"));
  // On other ranks, with another schedule, from the beginning where there is no checkpoint.
  EXPECT_THAT(output(1, flags("parts", "7", {"--resume", "--schedule", "gpipe"})), HasSubstr("goes on after step 6"));
  EXPECT_EQ(losses(output(2, flags("new", "2", {"--resume"}))).size(), 2u);
  EXPECT_THAT(failure(2, flags("whole", "6", {"--resume"})), AllOf(HasSubstr("6 steps"), HasSubstr("raise --steps")));
  EXPECT_THAT(failure(2, {"--resume"}), HasSubstr("--resume needs --checkpoint"));
}

TEST_F(LanguageModel, DropsTheSameUnderEverySchedule) {
  const auto run = [&](const std::string& kind, const std::string& dropout) {
    std::vector<double> found;
    for (const std::string& loss : losses(output(2, {"--schedule", kind, "--microbatches", "4", "--dropout", dropout})))
      found.push_back(std::stod(loss));
    return found;
  };
  const std::vector<double> first = run("dualpipe", "0.3");
  for (const std::string kind : {"zbv", "interleaved"})
    EXPECT_THAT(run(kind, "0.3"), ::testing::Pointwise(::testing::DoubleNear(1.5e-3), first)) << kind;
  EXPECT_NE(run("dualpipe", "0"), first);
}

/// torchrun starts all ranks again when one of them is killed.
TEST_F(LanguageModel, GoesOnUnderTorchrunAsIfNothingHadHappened) {
  if (!std::filesystem::exists(TORCHRUN)) GTEST_SKIP() << "there is no " << TORCHRUN;
  const auto flags = [&](const std::string& name) {
    return Flags{"--microbatches",
                 "4",
                 "--steps",
                 "8",
                 "--dropout",
                 "0.1",
                 "--seed",
                 "9",
                 "--checkpoint",
                 (folder / name).string(),
                 "--metrics",
                 (folder / (name + ".jsonl")).string(),
                 "--resume",
                 "--checkpoint-every",
                 "2"};
  };
  output(2, flags("whole"));

  // The first time, rank 1 is killed as soon as there is a checkpoint. Links are slow, so that the run is not over then.
  Flags program = command(2, flags("parts"));
  program.erase(program.begin(), std::find(program.begin(), program.end(), "--") + 1);
  program.insert(program.end(), {"--link-latency-ms", "20"});
  const std::string script =
      "if [ $RANK != 1 ] || [ $TORCHELASTIC_RESTART_COUNT != 0 ]; then exec \"$@\"; fi\n"
      "\"$@\" & until [ -d '" +
      (folder / "parts" / "step-00000002").string() + "' ]; do sleep 0.01; done; kill -9 $!; wait $!";
  Flags all{TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--no-python", "sh", "-c", script,
            "sh"};
  all.insert(all.end(), program.begin(), program.end());
  Process run(all, {{"OMP_NUM_THREADS", "1"}});
  ASSERT_EQ(run.wait(std::chrono::seconds(100)), 0) << run.out() << run.err();
  EXPECT_THAT(run.out(), ::testing::ContainsRegex("goes on after step [246]"));
  EXPECT_EQ(metrics(folder / "parts.jsonl").size(), 8u);
  EXPECT_EQ(metrics(folder / "parts.jsonl"), metrics(folder / "whole.jsonl"));
  const auto whole = files_of(folder / "whole" / "step-00000008"), parts = files_of(folder / "parts" / "step-00000008");
  EXPECT_GE(whole.size(), 5u);
  EXPECT_TRUE(whole == parts) << "every byte of weights and optimizer states";
}

TEST_F(LanguageModel, TheDemoGoesOnAfterAnInterrupt) {
  // The script among stand-ins for what is around it.
  namespace fs = std::filesystem;
  fs::create_directories(folder / "scripts");
  fs::create_directories(folder / "build/release/bin");
  fs::copy_file(DUALPIPE_DEMO, folder / "scripts/demo");
  write("scripts/setup", "#!/bin/sh\n");
  fs::permissions(folder / "scripts/setup", fs::perms::owner_all);
  fs::create_symlink(DUALPIPE_RUN, folder / "build/release/bin/dualpipe-run");
  fs::create_symlink(DUALPIPE_LM, folder / "build/release/bin/dualpipe-lm");
  // In a group of processes of its own, as a shell starts it.
  const auto demo = [&](const Flags& flags) {
    Flags all = command(2, flags);
    all.erase(all.begin(), std::find(all.begin(), all.end(), DUALPIPE_LM) + 1);
    all.insert(all.begin(), {"bash", "-c", "set -m; \"$0\" \"$@\" & echo \"group $! of \"; wait $!",
                             (folder / "scripts/demo").string(), "--microbatches", "4", "--checkpoint-every", "2"});
    return all;
  };
  {
    Process process(demo({"--steps", "1000000"}), {{"RANKS", "2"}});
    ASSERT_TRUE(process.wait_for_output("step 8 ")) << process.out() << process.err();
    const std::string text = process.out();
    ::kill(-std::stoi(text.substr(text.find("group ") + 6)), SIGINT);
    EXPECT_NE(process.wait(), 0);
    EXPECT_THAT(process.err(), AllOf(HasSubstr("out/demo has the last checkpoint"), HasSubstr("--new begins anew")));
  }
  {
    Process process(demo({"--steps", "100", "--layers", "4"}), {{"RANKS", "2"}});
    EXPECT_NE(process.wait(), 0);
    EXPECT_THAT(process.err(), AllOf(HasSubstr("another model"), HasSubstr("--new begins anew")));
  }
  const auto finish = [&](const Flags& flags) {
    Process process(demo(flags), {{"RANKS", "2"}});
    EXPECT_EQ(process.wait(), 0) << process.out() << process.err();
    EXPECT_FALSE(fs::exists(folder / "out/demo"));
    return process.out();
  };
  const fs::path saved = folder / "saved";
  fs::copy(folder / "out/demo", saved, fs::copy_options::recursive);
  EXPECT_THAT(finish({"--steps", "2", "--new"}), AllOf(HasSubstr("before training"), Not(HasSubstr("goes on"))));
  fs::rename(saved, folder / "out/demo");
  EXPECT_THAT(finish({"--steps", "1000000", "--minutes", "0.000001"}),  // they are used up: what comes after training
              AllOf(HasSubstr("goes on after step"), Not(HasSubstr("before training")), HasSubstr("sample")));
}

TEST_F(LanguageModel, WrongInputIsOneClearError) {
  EXPECT_THAT(failure(3, {"--microbatches", "8"}), AllOf(HasSubstr("even number of ranks"), HasSubstr("3")));
  EXPECT_THAT(failure(2, {"--microbatches", "5"}), AllOf(HasSubstr("even"), HasSubstr("5")));
  EXPECT_THAT(failure(2, {"--schedule", "dualpip"}), HasSubstr("dualpip"));
  EXPECT_THAT(failure(2, {"--partition", "3,4"}), HasSubstr("layer 'norm_head' is in no stage"));
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
