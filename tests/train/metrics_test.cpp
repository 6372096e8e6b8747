#include "dualpipe/train/metrics.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/planner/run_log.hpp"
#include "error_of.hpp"
#include "temporary_folder.hpp"

namespace dualpipe {
namespace {

using test::error_of;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Metrics, NumbersAreReadBackAsTheyWere) {
  const test::TemporaryFolder folder;
  const std::string path = folder / "run.jsonl";
  const double third = 1.0 / 3, tiny = std::numeric_limits<double>::denorm_min();
  MetricsWriter writer(path);
  writer.write({.step = 1, .loss = third, .learning_rate = tiny, .gradient_norm = 1e300, .tokens_per_second = 1200});
  EXPECT_EQ(detail::read_file(path),
            "{\"step\":1,\"loss\":0.3333333333333333,\"learning_rate\":5e-324,\"gradient_norm\":1e+300,"
            "\"tokens_per_second\":1200}\n")
      << "the line is there at once";
  writer.write({.step = 3, .loss = std::numeric_limits<double>::infinity()});
  EXPECT_THAT(detail::read_file(path), HasSubstr("{\"step\":3,\"loss\":null,"));
  const planner::RunLog log = planner::read_run_log(detail::read_file(path), path);
  EXPECT_THAT(log.steps, ElementsAre(1, 3));
  EXPECT_EQ(log.values.at("loss")[0], third);
  EXPECT_EQ(log.values.at("learning_rate")[0], tiny);
  EXPECT_TRUE(std::isnan(log.values.at("loss")[1]));
}

TEST(Metrics, AResumedRunCutsWhatCameLater) {
  const test::TemporaryFolder folder;
  const std::string path = folder / "run.jsonl";
  {
    MetricsWriter writer(path);
    for (int step = 1; step <= 5; ++step) writer.write({.step = step, .loss = 10.0 + step});
  }
  const std::string whole = detail::read_file(path);
  folder.write("run.jsonl", whole + "{\"step\":6,\"lo");  // it was killed within a line
  MetricsWriter(path, 9);
  EXPECT_EQ(detail::read_file(path), whole);
  MetricsWriter writer(path, 3);
  writer.write({.step = 4, .loss = 20});
  const planner::RunLog log = planner::read_run_log(detail::read_file(path), path);
  EXPECT_THAT(log.steps, ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(log.values.at("loss"), ElementsAre(11, 12, 13, 20));
  MetricsWriter(path, 0);
  EXPECT_EQ(detail::read_file(path), "");
  folder.write("run.jsonl", whole);
  MetricsWriter again(path);
  EXPECT_EQ(detail::read_file(path), "") << "a run that begins anew";
  folder.write("of another run", whole);
  std::filesystem::create_symlink("of another run", folder / "link.jsonl");
  MetricsWriter(folder / "link.jsonl", 5).write({.step = 6});
  EXPECT_EQ(detail::read_file(folder / "of another run"), whole);
  EXPECT_THAT(detail::read_file(folder / "link.jsonl"), ::testing::StartsWith(whole));
  MetricsWriter(folder / "new.jsonl", 7).write({.step = 8});
  EXPECT_THAT(detail::read_file(folder / "new.jsonl"), HasSubstr("\"step\":8"));
}

TEST(Metrics, WhatCannotBeWrittenIsNamed) {
  const test::TemporaryFolder folder;
  const std::string path = folder.write("notes.txt", "{\"step\":1}\nnotes\n");
  EXPECT_THAT(error_of([&] { MetricsWriter writer(path, 5); }), AllOf(HasSubstr(path), HasSubstr("line 2")));
  EXPECT_EQ(detail::read_file(path), "{\"step\":1}\nnotes\n");
  EXPECT_THAT(error_of([&] { MetricsWriter writer(path + "/file"); }),
              AllOf(HasSubstr(path), HasSubstr("Not a directory")));
  MetricsWriter writer(folder / "run.jsonl", 4);
  EXPECT_THAT(error_of([&] { writer.write({.step = 4}); }), HasSubstr("step 4"));
  writer.write({.step = 5});
  EXPECT_THAT(error_of([&] { writer.write({.step = 5}); }), HasSubstr("step 5"));
}

}  // namespace
}  // namespace dualpipe
