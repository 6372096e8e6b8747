#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/trace.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::planner {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::ThrowsMessage;

void expect_same(const Timeline& a, const Timeline& b) {
  EXPECT_EQ(a.name, b.name);
  EXPECT_EQ(a.num_ranks, b.num_ranks);
  EXPECT_EQ(a.seconds_per_unit, b.seconds_per_unit);
  EXPECT_EQ(a.intervals, b.intervals);
}

TEST(Trace, RoundTripIsExact) {
  for (const std::string& kind : schedule_kinds()) {
    Timeline timeline = simulate(make_schedule({kind, 4, 12}), {.forward = 0.1, .send = 1.0 / 3}).timeline;
    expect_same(from_trace(to_trace(timeline)), timeline);
    timeline.seconds_per_unit = 1;
    timeline.name = "measured \"here\" \xff";  // no UTF-8
    timeline.intervals.push_back({3, Lane::collective, parse_step("0F0"), 1e-7, 2e-7});
    timeline.stages = {{30, 1e9}, {}, {7, 0.5}};
    const Timeline back = from_trace(to_trace(timeline));
    EXPECT_EQ(back.intervals, timeline.intervals);
    EXPECT_THAT(back.name, HasSubstr("measured \"here\""));
    EXPECT_EQ(back.stages, timeline.stages);
  }
  expect_same(from_trace(to_trace({})), {});
}

TEST(Trace, IsWhatViewersExpect) {
  Timeline timeline{.name = "t", .num_ranks = 2, .seconds_per_unit = 1, .intervals = {}};
  timeline.intervals = {{1, Lane::compute, parse_step("(0F7;7B3)OVERLAP_F_B"), 0.5, 0.75},
                        {1, Lane::receive, parse_step("0I3"), 0.25, 0.5}};
  const json root = json::parse(to_trace(timeline));
  std::vector<json> complete;
  std::vector<std::string> names;
  for (const json& event : root["traceEvents"]) {
    if (event["ph"] == "X") complete.push_back(event);
    if (event["ph"] == "M" && event["args"].contains("name"))
      names.push_back(detail::str(event["name"].get<std::string>(), " ", event["pid"], ".", event["tid"], " ",
                                  event["args"]["name"].get<std::string>()));
  }
  ASSERT_EQ(complete.size(), 2U);
  EXPECT_EQ(complete[0]["name"], "(0F7;7B3)OVERLAP_F_B");
  EXPECT_EQ(complete[0]["cat"], "overlapped");
  EXPECT_EQ(complete[0]["ts"], 500000.0);  // microseconds
  EXPECT_EQ(complete[0]["dur"], 250000.0);
  EXPECT_EQ(complete[0]["pid"], 1);
  EXPECT_EQ(complete[1]["cat"], "receive");
  EXPECT_NE(complete[0]["tid"], complete[1]["tid"]);
  EXPECT_THAT(names, testing::UnorderedElementsAre("process_name 0.0 rank 0", "process_name 1.0 rank 1",
                                                   "thread_name 1.0 compute", "thread_name 1.2 receive"));
  // One abstract unit is a millisecond.
  timeline.seconds_per_unit = 0;
  EXPECT_THAT(to_trace(timeline), HasSubstr("\"ts\":500.0"));
}

TEST(Trace, NodesAndCollectivesKeepTheirNames) {
  Timeline timeline{.name = "t", .num_ranks = 1, .seconds_per_unit = 1, .intervals = {}};
  timeline.intervals = {{0, Lane::compute, parse_step("(0F1;0B0)OVERLAP_F_B"), 0, 3, {}},
                        {0, Lane::node, parse_step("0I0"), 0, 1, "layer 3 \"MLP\""},
                        {0, Lane::collective, parse_step("0F1"), 1, 2, "dispatch"},
                        {0, Lane::reduction, parse_step("0W0"), 3, 4, "gradients"}};
  expect_same(from_trace(to_trace(timeline)), timeline);
  const json root = json::parse(to_trace(timeline));
  const auto named = [&](const std::string& name) {
    return std::count_if(root["traceEvents"].begin(), root["traceEvents"].end(),
                         [&](const json& event) { return event["name"] == name; });
  };
  EXPECT_EQ(named("0F1 dispatch"), 1);
  EXPECT_EQ(named("0W0 gradients"), 1);
  EXPECT_EQ(named("0I0 layer 3 \"MLP\""), 1);
}

TEST(Trace, EventsOfOthersAreSkipped) {
  const Timeline timeline = simulate(make_schedule({"1f1b", 2, 2})).timeline;
  json root = json::parse(to_trace(timeline));
  root["traceEvents"].push_back({{"name", "kernel"}, {"ph", "X"}, {"ts", 1}, {"dur", 2}, {"pid", 77}, {"tid", 9}});
  root["traceEvents"].push_back({{"name", "counter"}, {"ph", "C"}, {"args", {{"op", "?"}}}});
  root["traceEvents"].push_back(json::object());
  expect_same(from_trace(root.dump()), timeline);
}

TEST(Trace, MalformedInputIsRefusedWithItsPlace) {
  const Timeline timeline{.name = "t", .num_ranks = 1, .intervals = {{0, Lane::compute, parse_step("0F0"), 0, 1}}};
  const json good = json::parse(to_trace(timeline));
  const std::size_t event = good["traceEvents"].size() - 1;
  const auto refused = [](const std::string& text) { return [text] { from_trace(text); }; };
  const auto with = [&](const std::string& pointer, const json& value) {
    json bad = good;
    bad[json::json_pointer(pointer)] = value;
    return refused(bad.dump());
  };
  const std::string here = detail::str("/traceEvents/", event), named = detail::str("trace event ", event, ": ");
  EXPECT_THAT(refused(""), ThrowsMessage<InvalidArgument>(HasSubstr("line 1, column 1")));
  EXPECT_THAT(refused(good.dump(1).substr(0, 100)),
              ThrowsMessage<InvalidArgument>(HasSubstr("not JSON: parse error at line")));
  EXPECT_THAT(refused("[]"), ThrowsMessage<InvalidArgument>(HasSubstr("not a trace of this library")));
  EXPECT_THAT(refused(R"({"traceEvents":[],"otherData":[]})"),
              ThrowsMessage<InvalidArgument>(HasSubstr("lacks the number \"num_ranks\"")));
  EXPECT_THAT(with("/otherData/num_ranks", 2000000000),
              ThrowsMessage<InvalidArgument>(HasSubstr("claims 2e+09 ranks")));
  EXPECT_THAT(with("/otherData/num_ranks", 0.5), ThrowsMessage<InvalidArgument>(HasSubstr("claims 0.5 ranks")));
  EXPECT_THAT(with("/otherData/seconds_per_unit", -1), ThrowsMessage<InvalidArgument>(HasSubstr("seconds_per_unit")));
  EXPECT_THAT(with("/otherData/stages", 7), ThrowsMessage<InvalidArgument>(HasSubstr("are no list")));
  EXPECT_THAT(with("/otherData/stages", json::parse(R"([{"parameters": 3}])")),
              ThrowsMessage<InvalidArgument>(HasSubstr("stage 0 needs \"bytes\"")));
  EXPECT_THAT(with("/otherData/stages", json::parse(R"([{"parameters": -3, "bytes": 1}])")),
              ThrowsMessage<InvalidArgument>(HasSubstr("stage 0 needs \"parameters\"")));
  EXPECT_THAT(with(here, 7), ThrowsMessage<InvalidArgument>(HasSubstr(named + "expected an object")));
  EXPECT_THAT(with(here + "/pid", 1), ThrowsMessage<InvalidArgument>(HasSubstr(named + "rank (pid) 1 of 1")));
  EXPECT_THAT(with(here + "/pid", "x"),
              ThrowsMessage<InvalidArgument>(HasSubstr(named + "has a wrong type for \"pid\"")));
  EXPECT_THAT(with(here + "/tid", 9), ThrowsMessage<InvalidArgument>(HasSubstr(named + "lane (tid) 9")));
  EXPECT_THAT(with(here + "/tid", 1.0e300), ThrowsMessage<InvalidArgument>(HasSubstr(named)));
  EXPECT_THAT(with(here + "/pid", 1ULL << 63), ThrowsMessage<InvalidArgument>(HasSubstr(named)));
  EXPECT_THAT(with(here + "/args/op", "0Q0"), ThrowsMessage<InvalidArgument>(HasSubstr(named)));
  EXPECT_THAT(with(here + "/args/op", 3),
              ThrowsMessage<InvalidArgument>(HasSubstr(named + "has a wrong type for \"op\"")));
  EXPECT_THAT(with(here + "/args/begin", "now"), ThrowsMessage<InvalidArgument>(HasSubstr("\"begin\"")));
  EXPECT_THAT(with(here + "/args/end", -1), ThrowsMessage<InvalidArgument>(HasSubstr(named + "lasts from 0 to -1")));
  json lacking = good;
  lacking["traceEvents"][event]["args"].erase("end");
  EXPECT_THAT(refused(lacking.dump()), ThrowsMessage<InvalidArgument>(HasSubstr(named + "lacks \"end\"")));
}

}  // namespace
}  // namespace dualpipe::planner
