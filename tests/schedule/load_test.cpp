#include "dualpipe/schedule/load.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <iterator>
#include <string>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "temporary_folder.hpp"

namespace dualpipe {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

class Files : public testing::Test {
 protected:
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  auto count() const { return std::distance(fs::directory_iterator(folder_.path()), fs::directory_iterator()); }

  dualpipe::test::TemporaryFolder folder_;
};

TEST_F(Files, AKindElseAFile) {
  const ScheduleSpec spec{.kind = "dualpipe", .num_ranks = 4, .num_micro_batches = 8};
  EXPECT_EQ(load_schedule(spec), make_schedule(spec));
  detail::write_file(path("own.csv"), to_csv(make_schedule(spec)));
  for (const ScheduleSpec& sizes : {ScheduleSpec{}, spec}) {
    const Schedule loaded = load_schedule({path("own.csv"), sizes.num_ranks, sizes.num_micro_batches});
    EXPECT_EQ(loaded.ranks, make_schedule(spec).ranks);
    EXPECT_EQ(loaded.name, path("own.csv"));
  }
}

TEST_F(Files, WhatIsNoScheduleIsNamed) {
  const auto refused = [](const ScheduleSpec& spec, const auto& text) {
    EXPECT_THAT([&] { load_schedule(spec); }, ThrowsMessage<InvalidArgument>(text));
  };
  refused({"dualpip", 4, 8}, AllOf(HasSubstr("\"dualpip\" is neither a kind"), HasSubstr("dualpipev")));
  refused({folder_.path().string(), 4, 8}, HasSubstr("it is a directory"));
  detail::write_file(path("bad.csv"), "0F0,x\n");
  refused({path("bad.csv")}, AllOf(HasSubstr(path("bad.csv")), HasSubstr("cell 2")));
  detail::write_file(path("two.csv"), "0F0,0B0\n1F0,1B0\n");
  refused({path("two.csv"), 3, 0}, HasSubstr("is for 2 ranks, there are 3"));
  refused({path("two.csv"), 2, 4}, HasSubstr("has 1 micro-batches, num_micro_batches is 4"));
}

TEST_F(Files, AreReplacedAsAWhole) {
  detail::write_file(path("text"), "old");
  fs::create_symlink("text", path("link"));
  detail::write_file(path("link"), std::string("new\0text", 8));
  EXPECT_EQ(detail::read_file(path("link")), std::string("new\0text", 8));
  EXPECT_EQ(detail::read_file(path("text")), "old") << "a link is not followed";
  EXPECT_FALSE(fs::is_symlink(path("link")));
  EXPECT_EQ(count(), 2) << "nothing else is left";
  EXPECT_THAT([&] { detail::write_file(path("missing/text"), ""); },
              ThrowsMessage<InvalidArgument>(HasSubstr("cannot write " + path("missing/text"))));
  EXPECT_THAT([&] { detail::read_file(path("missing")); },
              ThrowsMessage<InvalidArgument>(HasSubstr("cannot read " + path("missing"))));
  fs::create_directory(path("folder"));
  EXPECT_THROW(detail::write_file(path("folder"), ""), InvalidArgument);
  EXPECT_EQ(count(), 3);
}

/// A file that may not grow fails as on a full disk: in write().
TEST_F(Files, ThatDoNotFitLeaveWhatWasThere) {
  detail::write_file(path("text"), "old");
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit limit{.rlim_cur = 4096, .rlim_max = before.rlim_max};
  auto* const handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  EXPECT_THAT([&] { detail::write_file(path("text"), std::string(10'000, 'x')); },
              ThrowsMessage<InvalidArgument>(HasSubstr("cannot write " + path("text") + ": File too large")));
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(detail::read_file(path("text")), "old");
  EXPECT_EQ(count(), 1) << "the draft must be gone";
}

}  // namespace
}  // namespace dualpipe
