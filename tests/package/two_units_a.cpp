#include <gmock/gmock.h>

#include "dualpipe/dualpipe.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "two_units.hpp"

namespace {

TEST(TwoUnits, AgreeOnASchedule) {
  const dualpipe::Schedule here = dualpipe::make_schedule({.kind = "dualpipe", .num_ranks = 4, .num_micro_batches = 8});
  EXPECT_EQ(schedule_text(4, 8), dualpipe::to_csv(here));
}

TEST(TwoUnits, AnErrorThrownInOneIsCaughtInTheOther) {
  EXPECT_THAT(error_text(3, 8), ::testing::HasSubstr("3"));
  EXPECT_THAT(error_text(4, 8), ::testing::IsEmpty());
}

TEST(Version, IsTheProjects) {
  EXPECT_STREQ(DUALPIPE_VERSION, DUALPIPE_PROJECT_VERSION);
  EXPECT_EQ(dualpipe::detail::str(DUALPIPE_VERSION_MAJOR, ".", DUALPIPE_VERSION_MINOR, ".", DUALPIPE_VERSION_PATCH),
            DUALPIPE_VERSION);
}

}  // namespace
