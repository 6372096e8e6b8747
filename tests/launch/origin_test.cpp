#include "tools/run/origin.hpp"

#include <gtest/gtest.h>

namespace dualpipe::run {
namespace {

TEST(Origin, IsUnknownWithoutATestimony) { EXPECT_EQ(find_origin({}), std::nullopt); }

TEST(Origin, IsWhomMostName) {
  EXPECT_EQ(find_origin({{.origin = 1, .time_ns = 1}, {.origin = 2, .time_ns = 9}, {.origin = 2, .time_ns = 8}}), 2);
}

TEST(Origin, IsNamedFirstOfThoseNamedEquallyOften) {
  EXPECT_EQ(find_origin({{.origin = 1, .time_ns = 5}, {.origin = 2, .time_ns = 4}, {.origin = 3, .time_ns = 6}}), 2);
  EXPECT_EQ(find_origin({{.origin = 1, .time_ns = 5},
                         {.origin = 2, .time_ns = 6},
                         {.origin = 2, .time_ns = 4},
                         {.origin = 1, .time_ns = 7}}),
            2);
}

TEST(Origin, WasKilledRatherThanEndedAtTheSameTime) {
  EXPECT_EQ(find_origin({{.origin = 1, .time_ns = 5}, {.origin = 2, .time_ns = 5, .killed = true}}), 2);
}

}  // namespace
}  // namespace dualpipe::run
