// Files that are larger than anything sensible are read or refused in memory that is a small multiple of their size,
// whatever is in them. Memory and calls of operator new are counted; a reader that is worse than linear would run into
// the test's time limit.
#include <gtest/gtest.h>

#include <string>

#include "dualpipe/config.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/trace.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "fuzz/allocations.hpp"

namespace dualpipe::fuzz {
namespace {

using namespace std::string_literals;

constexpr std::size_t ten_megabytes = 10'000'000, one_megabyte = 1'000'000;

std::string repeated(const std::string& part, std::size_t bytes) {
  std::string text;
  text.reserve(bytes + part.size());
  while (text.size() < bytes) text += part;
  return text;
}

/// Peak bytes for each byte of `text`; what refuses it has a short message.
template <class Read>
double bytes_per_byte(const std::string& text, const Read& read) {
  std::string message;
  const Allocations used = allocations_of([&] {
    try {
      read(text);
    } catch (const InvalidArgument& error) {
      message = error.what();
    }
  });
  EXPECT_LT(message.size(), 2000U) << message.substr(0, 100);
  return static_cast<double>(used.peak_bytes) / static_cast<double>(text.size());
}

double csv(const std::string& text) {
  return bytes_per_byte(text, [](const std::string& csv_text) { check(from_csv(csv_text)); });
}

double trace(const std::string& text) {
  return bytes_per_byte(text, [](const std::string& json) { planner::from_trace(json); });
}

double config(const std::string& text) {
  return bytes_per_byte(text, [](const std::string& json) { DualPipeOptions::from_json(json); });
}

TEST(Large, ScheduleOfAMillionCells) {
  const std::string text = to_csv(make_schedule({.kind = "1f1b", .num_ranks = 64, .num_micro_batches = 8192}));
  Schedule schedule;
  const Allocations used = allocations_of([&] { check(schedule = from_csv(text)); });
  EXPECT_EQ(schedule.num_micro_batches, 8192);
  EXPECT_LT(used.peak_bytes, 20 * text.size());
  EXPECT_LT(used.count, 1'000'000 / 100);  // by doubling, not by cell
}

TEST(Large, CsvOfOneLineOfTenMegabytes) {
  for (const std::string& part : {"0"s, ","s, "0F0,"s}) EXPECT_LT(csv(repeated(part, ten_megabytes)), 30) << part;
}

TEST(Large, CsvOfManyTokens) {
  for (const std::string& part : {"0F0"s, "("s, ")OVERLAP_F_B"s, ",,0F0"s, "\n"s, ",\n"s, "\r\n"s, "F\n"s, "0F0\n"s,
                                  "0W0\n"s, "1SEND_F0,"s, "\0"s, " "s, "0BW0,"s, "0B0,0W0,"s, "\"0F0\","s, "\""s})
    EXPECT_LT(csv(repeated(part, one_megabyte)), 30) << part;
  EXPECT_LT(csv("0F0,0B0\n" + repeated("\n", one_megabyte) + "1F0,1B0\n"), 1);
}

TEST(Large, CsvOfAMillionRanksWithFindings) {
  std::string text;
  for (int i = 0; i < 1'000'000; ++i) text += "0W" + std::to_string(i) + "\n";
  EXPECT_LT(csv(text), 40);
}

TEST(Large, TraceOfManyEvents) {
  const Timeline timeline =
      simulate(make_schedule({.kind = "1f1b", .num_ranks = 8, .num_micro_batches = 2048})).timeline;
  const std::string text = planner::to_trace(timeline);
  EXPECT_GT(text.size(), 4'000'000U);
  EXPECT_LT(trace(text), 20);
}

TEST(Large, JsonOfManyTokens) {
  constexpr double bound = 60;
  for (const std::string& part : {"["s, "{\"a\":"s, "0"s, "\""s, "\"\\u0000"s, " "s, "-"s, "{"s}) {
    EXPECT_LT(trace(repeated(part, one_megabyte)), bound) << part;
    EXPECT_LT(config(repeated(part, one_megabyte)), bound) << part;
  }
  for (const std::string& part : {"0,"s, "[],"s, "{},"s, "\"\","s, "{\"a\":0},"s}) {
    const std::string elements = "[" + repeated(part, one_megabyte) + "0]";
    EXPECT_LT(trace(elements), bound) << part;
    EXPECT_LT(config(elements), bound) << part;
    EXPECT_LT(trace(R"({"otherData":{"num_ranks":1,"seconds_per_unit":1},"traceEvents":)" + elements + "}"), bound)
        << part;
  }
}

TEST(Large, JsonOfOneLineOfTenMegabytes) {
  constexpr double bound = 20;
  const std::string text = "\"" + repeated("x", ten_megabytes) + "\"";
  EXPECT_LT(trace(text), bound);
  EXPECT_LT(config(text), bound);
  EXPECT_LT(config("{" + text + ":1}"), bound);
  EXPECT_LT(config(R"({"publish":)" + text + "}"), bound);
  EXPECT_LT(config("{" + text + ":1," + text + ":1}"), bound);
}

}  // namespace
}  // namespace dualpipe::fuzz
