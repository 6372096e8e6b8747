#include "dualpipe/planner/render.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <fstream>
#include <limits>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::planner {
namespace {

using testing::HasSubstr;
using testing::Not;
using testing::ThrowsMessage;

Timeline timeline_of(const std::string& kind, int ranks, int micro_batches, const Costs& costs = {},
                     Publish publish = Publish::early) {
  return simulate(make_schedule({kind, ranks, micro_batches}), costs, publish).timeline;
}

std::string golden(const std::string& name) {
  std::ifstream file(std::string(DUALPIPE_GOLDENS) + "/" + name);
  EXPECT_TRUE(file.good()) << name;
  std::ostringstream text;
  text << file.rdbuf();
  return std::move(text).str();
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) out.push_back(line);
  return out;
}

std::size_t count(const std::string& text, const std::string& what) {
  std::size_t found = 0;
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + what.size())) ++found;
  return found;
}

// Compared by eye with the figure of the DeepSeek-V3 report: 8 ranks, 10 micro-batches from each end.
TEST(Ascii, TheFigureOfTheReport) {
  EXPECT_EQ(to_ascii(timeline_of("dualpipe", 8, 20, {}, Publish::atomic)), golden("render_dualpipe_8x20_atomic.txt"));
  EXPECT_EQ(to_ascii(timeline_of("dualpipe", 8, 20)), golden("render_dualpipe_8x20_early.txt"));
}

TEST(Ascii, SmallPictureWordForWord) {
  EXPECT_EQ(to_ascii(timeline_of("1f1b", 2, 3)),
            "time    0         5         10\n"
            "rank 0  0 1 ..[0 ]2 [1 ]..[2 ]\n"
            "rank 1  ..0 [0 ]1 [1 ]2 [2 ]..\n"
            "        0  forward   [0 ] backward   ... idle\n"
            "        micro-batches 0-2 enter at rank 0\n");
}

TEST(Ascii, NumbersAreDecimalWhereLettersDoNotSuffice) {
  const std::string picture = to_ascii(timeline_of("dualpipe", 2, 120));
  EXPECT_THAT(picture, HasSubstr("{59&118    }"));
  EXPECT_THAT(picture, HasSubstr("micro-batches 0-59 enter at rank 0, 60-119 enter at rank 1\n"));
  EXPECT_THAT(to_ascii(timeline_of("dualpipe", 2, 36)), HasSubstr("a = 10 ... z = 35\n"));
}

TEST(Ascii, EveryStepIsAsWideAsItIsLong) {
  // Three columns for the shortest step, which costs 1.
  const Costs costs{.forward = 1, .backward = 2.5, .weight = 1.5, .pair = 3, .send = 0.25};
  for (const std::string& kind : schedule_kinds()) {
    const Timeline timeline = timeline_of(kind, 4, 40, costs);
    const std::vector<std::string> picture = lines(to_ascii(timeline));
    const std::size_t end = 8 + static_cast<std::size_t>(report(timeline).makespan * 3);
    for (int rank = 0; rank < 4; ++rank) {
      const std::string row =
          picture[static_cast<std::size_t>(rank) + 1] + std::string(2, ' ');  // a last forward may end in spaces
      EXPECT_NEAR(static_cast<double>(row.size()), static_cast<double>(end), 3) << kind;
      for (const Interval& interval : timeline.intervals) {
        if (interval.rank != rank || interval.lane != Lane::compute || interval.step.op.pass != Pass::Forward) continue;
        const std::size_t at =
            8 + static_cast<std::size_t>(interval.begin * 3 + 0.5) + (interval.step.overlapped ? 1 : 0);
        const std::string number = std::to_string(interval.step.op.micro_batch);
        EXPECT_EQ(row.substr(at, number.size()), number) << kind << " " << to_string(interval.step) << "\n" << row;
      }
    }
  }
}

TEST(Ascii, ColorAddsOnlyColor) {
  const Timeline timeline = timeline_of("dualpipe", 4, 8);
  const std::string plain = to_ascii(timeline);
  EXPECT_THAT(plain, Not(HasSubstr("\x1b")));
  const std::vector<std::string> colored =
      lines(std::regex_replace(to_ascii(timeline, {.color = true}), std::regex("\x1b\\[[0-9;]*m"), ""));
  const std::vector<std::string> expected = lines(plain);
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(colored[i].substr(0, expected[i].size()), expected[i]);
  EXPECT_EQ(colored.back(), "        dark: entered at rank 0, light: entered at rank 3");
  // The two directions of a pass differ.
  EXPECT_THAT(to_ascii(timeline, {.color = true}), testing::AllOf(HasSubstr("48;5;75m0 "), HasSubstr("48;5;153m4 ")));
}

TEST(Ascii, PipelinesSideBySideHaveTheirShades) {
  const Timeline one = timeline_of("dualpipe", 4, 8);
  Timeline two{.name = "two", .num_ranks = 8, .intervals = one.intervals};
  for (Interval interval : one.intervals) {
    interval.rank += 4;
    two.intervals.push_back(interval);
  }
  const std::vector<std::string> lone = lines(to_ascii(one, {.color = true})),
                                 both = lines(to_ascii(two, {.color = true}));
  for (std::size_t rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(both[rank + 1], lone[rank + 1]);
    EXPECT_EQ(both[rank + 5].substr(6), lone[rank + 1].substr(6));  // but for its number
  }
  EXPECT_THAT(both.back(), HasSubstr("dark: entered at the first rank of a pipeline, light: entered at the last"));
  EXPECT_THAT(to_ascii(timeline_of("dualpipev", 4, 8), {.color = true}), HasSubstr("dark: first stage of the rank"));
}

TEST(Ascii, MeasuredTimelines) {
  // Uneven, in seconds, and with a step so short that it cannot be shown.
  Timeline timeline{.name = "measured", .num_ranks = 1, .seconds_per_unit = 1, .intervals = {}};
  timeline.intervals = {{0, Lane::compute, parse_step("0F0"), 100.0, 100.011},
                        {0, Lane::compute, parse_step("0B0"), 100.0131, 100.0333},
                        {0, Lane::compute, parse_step("0F1"), 100.0333, 100.0333}};
  const std::vector<std::string> picture = lines(to_ascii(timeline));
  EXPECT_EQ(picture[0], "time/s  0");
  EXPECT_EQ(picture[1], "rank 0  0 [0 ]");
  EXPECT_EQ(lines(to_ascii({}))[0], "time    0");
  // The largest numbers that an op can have.
  timeline.intervals[0].step = parse_step("2147483647F2147483647");
  EXPECT_THAT(to_ascii(timeline), HasSubstr("2147483647 ..[0 "));
  EXPECT_THAT(to_svg({timeline}), HasSubstr("2147483648 micro-batches"));
}

TEST(Ascii, RefusesTimelinesThatAreNotSound) {
  Timeline timeline = timeline_of("1f1b", 2, 4);
  timeline.intervals[0].end = std::numeric_limits<double>::infinity();
  EXPECT_THAT([&] { to_ascii(timeline); },
              ThrowsMessage<InvalidArgument>(HasSubstr("0F0 of rank 0 lasts from 0 to inf")));
  timeline.intervals[0].end = -1;
  EXPECT_THAT([&] { to_svg({timeline}); }, ThrowsMessage<InvalidArgument>(HasSubstr("from 0 to -1")));
  timeline.intervals[0] = {5, Lane::send, {}, 0, 1};
  EXPECT_THAT([&] { to_svg({timeline}); },
              ThrowsMessage<InvalidArgument>(HasSubstr("rank 5 in a timeline of 2 ranks")));
}

Timeline measured_pair(double at) {
  // One pair on rank 1 of two, in seconds: combine hides half, dispatch not at all.
  Timeline timeline{.name = "measured", .num_ranks = 2, .seconds_per_unit = 1, .intervals = {}};
  timeline.intervals = {{0, Lane::compute, parse_step("0F0"), at, at + 0.4},
                        {1, Lane::compute, parse_step("(1F1;1B0)OVERLAP_F_B"), at + 0.1, at + 1.1},
                        {1, Lane::node, parse_step("1F1"), at + 0.1, at + 0.4, "attention"},
                        {1, Lane::collective, parse_step("1B0"), at + 0.1, at + 0.7, "combine"},
                        {1, Lane::node, parse_step("1I0"), at + 0.7, at + 0.9, "MLP"},
                        {1, Lane::collective, parse_step("1F1"), at + 0.9, at + 1.1, "dispatch"}};
  return timeline;
}

TEST(Ascii, LanesNameNodesAndCollectives) {
  const Timeline timeline = measured_pair(7);
  EXPECT_EQ(to_ascii(timeline, {.lanes = true}),
            "time/s                 0           0.2         0.4         0.6         0.8         1\n"
            "rank 0, compute        [F0                    ]..........................................\n"
            "rank 0, communication  ..................................................................\n"
            "rank 1, compute        ......[attention-F     ]..................[MLP-B     ]............\n"
            "rank 1, communication  ......[combine-B                         ]............[dispatch-F]\n");
}

TEST(Ascii, RowsAndWindowShowAPart) {
  const Timeline timeline = timeline_of("1f1b", 4, 6);
  const std::vector<std::string> all = lines(to_ascii(timeline)), some = lines(to_ascii(timeline, {.ranks = {2, 0}}));
  EXPECT_EQ(some[0], all[0]);
  EXPECT_EQ(some[1], all[3]);
  EXPECT_EQ(some[2], all[1]);
  // A step that reaches beyond the window is cut.
  const std::vector<std::string> part = lines(to_ascii(timeline, {.window = Window{5, 11}, .ranks = {3}}));
  EXPECT_EQ(part[0], "time    5         10");
  EXPECT_EQ(part[1], "rank 3  [01 [1 ]2 [2");
  // One that reaches beyond the timeline shows as much as there is.
  EXPECT_EQ(to_ascii(timeline, {.window = Window{-5, std::numeric_limits<double>::infinity()}}), to_ascii(timeline));
  EXPECT_THAT([&] { to_ascii(timeline, {.window = Window{std::numeric_limits<double>::quiet_NaN(), 5}}); },
              ThrowsMessage<InvalidArgument>(HasSubstr("the window from nan to 5 shows nothing")));
  EXPECT_THAT([&] { to_ascii(timeline, {.ranks = {4}}); },
              ThrowsMessage<InvalidArgument>(HasSubstr("rank 4 cannot be shown, there are 4 ranks")));
  EXPECT_THAT([&] { to_svg({timeline}, {.window = Window{70, 80}}); },
              ThrowsMessage<InvalidArgument>(HasSubstr("the window from 70 to 80 shows nothing")));
  EXPECT_THAT([&] { to_svg({timeline}, {.window = Window{2, 2}}); },
              ThrowsMessage<InvalidArgument>(HasSubstr("window")));
}

TEST(Ascii, MarksAndNotes) {
  const Timeline timeline = timeline_of("1f1b", 2, 2);
  const std::string picture = to_ascii(
      timeline, {.marks = {{1, {1, 4}, "1"}, {1, {4, 7}, "2"}, {0, {100, 200}, "not in sight"}}, .notes = {"a note"}});
  EXPECT_EQ(picture,
            "time    0         5\n"
            "rank 0  0 1 ..[0 ]..[1 ]\n"
            "\n"
            "rank 1  ..0 [0 ]1 [1 ]..\n"
            "          1-----2-----\n"
            "        0  forward   [0 ] backward   ... idle\n"
            "        micro-batches 0-1 enter at rank 0\n"
            "a note\n");
}

/// Tags open and close properly, which is what a picture of ours can get wrong.
void expect_well_formed(const std::string& xml) {
  std::vector<std::string> open;
  const std::regex tag("<(/?)([a-z]+)((?: [a-zA-Z0-9:-]+=\"[^\"<]*\")*)(/?)>");
  std::size_t tags = 0;
  for (std::sregex_iterator it(xml.begin(), xml.end(), tag), end; it != end; ++it, ++tags) {
    if ((*it)[1].length() > 0) {
      ASSERT_FALSE(open.empty());
      ASSERT_EQ(open.back(), (*it)[2]);
      open.pop_back();
    } else if ((*it)[4].length() == 0) {
      open.push_back((*it)[2]);
    }
  }
  EXPECT_TRUE(open.empty());
  EXPECT_EQ(tags, count(xml, "<"));  // each of them was one of these
}

TEST(Svg, SmallPictureWordForWord) {
  EXPECT_EQ(to_svg({timeline_of("dualpipe", 2, 2, {.send = 0.25})}), golden("render_dualpipe_2x2.svg"));
}

TEST(Svg, HoldsEveryStepOnceAndAFramePerPair) {
  for (const std::string& kind : schedule_kinds()) {
    const Timeline timeline = timeline_of(kind, 4, 8);
    const std::string svg = to_svg({timeline});
    expect_well_formed(svg);
    std::size_t pairs = 0;
    for (const Interval& interval : timeline.intervals) {
      pairs += interval.step.overlapped.has_value();
      EXPECT_EQ(count(svg, "<title>" + to_string(interval.step) + ","), 1U) << kind;
    }
    EXPECT_EQ(count(svg, "stroke=\"#222222\" stroke-width"), pairs) << kind;
    for (int rank = 0; rank < 4; ++rank) EXPECT_EQ(count(svg, ">rank " + std::to_string(rank) + "<"), 1U);
  }
}

/// The rectangles drawn in the group with this title.
std::vector<std::string> group(const std::string& svg, const std::string& title) {
  const std::size_t begin = svg.find("<title>" + title), end = svg.find("</g>", begin);
  EXPECT_NE(begin, std::string::npos) << title;
  return begin == std::string::npos ? std::vector<std::string>{} : lines(svg.substr(begin, end - begin));
}

double attribute(const std::string& element, const std::string& name) {
  std::smatch match;
  EXPECT_TRUE(std::regex_search(element, match, std::regex(" " + name + "=\"([-0-9.]+)\""))) << element;
  return match.empty() ? 0 : std::stod(match[1]);
}

TEST(Svg, NodesAndCollectivesHaveLanesAndWhatIsExposedIsRed) {
  const std::string svg = to_svg({measured_pair(3)});
  expect_well_formed(svg);
  const auto node = group(svg, "attention, 1F1, 0.1 to 0.4 s"), combine = group(svg, "combine, 1B0, 0.1 to 0.7 s"),
             dispatch = group(svg, "dispatch, 1F1, 0.9 to 1.1 s");
  ASSERT_EQ(node.size(), 3U);
  EXPECT_THAT(node[2], HasSubstr(">attention-F<"));
  EXPECT_EQ(attribute(node[1], "x"), attribute(combine[1], "x"));
  EXPECT_NEAR(attribute(combine[1], "width"), 2 * attribute(node[1], "width"), 0.02);
  // The forward's collectives above the backward's, both below the node.
  EXPECT_GT(attribute(dispatch[1], "y"), attribute(node[1], "y"));
  EXPECT_GT(attribute(combine[1], "y"), attribute(dispatch[1], "y"));
  // Exposed: 0.4 to 0.7 and 0.9 to 1.1.
  std::vector<double> exposed;
  for (const std::string& line : lines(svg))
    if (line.find("#d62728") != std::string::npos) exposed.push_back(attribute(line, "width"));
  ASSERT_EQ(exposed.size(), 3U);  // the last is the legend's
  EXPECT_NEAR(exposed[0], attribute(node[1], "width"), 0.02);
  EXPECT_NEAR(exposed[1], attribute(dispatch[1], "width"), 0.02);
  EXPECT_EQ(count(svg, ">forward's<"), 2U);
}

TEST(Svg, AWindowIsDrawnAsWideAsTheWhole) {
  const Timeline timeline = measured_pair(3);
  const std::string svg = to_svg({timeline}, {.window = Window{3.4, 3.9}, .ranks = {1}});
  expect_well_formed(svg);
  EXPECT_THAT(svg, HasSubstr("makespan 1.1 s; shown from 0.4 to 0.9 s"));
  EXPECT_EQ(count(svg, ">rank 1<"), 1U);
  EXPECT_EQ(count(svg, ">rank 0<"), 0U);
  EXPECT_EQ(count(svg, "attention"), 0U);  // over before the window
  const auto combine = group(svg, "combine, 1B0, 0.1 to 0.7 s"), node = group(svg, "MLP, 1I0, 0.7 to 0.9 s");
  EXPECT_NEAR(attribute(combine[1], "width"), 1.5 * attribute(node[1], "width"), 0.02);  // 0.3 of it is in sight
  EXPECT_NEAR(attribute(combine[1], "x") + attribute(combine[1], "width"), attribute(node[1], "x"), 0.02);
}

TEST(Svg, MarksAndNotes) {
  const Timeline timeline = timeline_of("dualpipe", 2, 2);
  const std::string svg = to_svg({timeline, timeline}, {.marks = {{0, {0, 1}, "<1>"}}, .notes = {"first", "second"}});
  expect_well_formed(svg);
  EXPECT_EQ(count(svg, ">&lt;1&gt;<"), 1U);  // in the first picture only
  EXPECT_EQ(count(svg, ">first<"), 1U);
  EXPECT_EQ(count(svg, ">second<"), 1U);
}

TEST(Svg, StacksTimelinesOfDifferentUnits) {
  const Timeline predicted = timeline_of("dualpipev", 2, 4);
  Timeline measured = predicted;
  measured.name = "<measured> & \"quoted\"";
  measured.seconds_per_unit = 1;
  for (Interval& interval : measured.intervals) interval.begin *= 0.01, interval.end *= 0.01;
  const std::string svg = to_svg({predicted, measured});
  expect_well_formed(svg);
  EXPECT_THAT(svg, HasSubstr("&lt;measured&gt; &amp; &quot;quoted&quot;: 2 ranks, 4 micro-batches, makespan 0."));
  EXPECT_EQ(count(svg, "<title>0F0, 0 to 1</title>"), 1U);
  EXPECT_EQ(count(svg, "<title>0F0, 0 to 0.01 s</title>"), 1U);
  // Scaled to its own makespan: the same rectangle, further down.
  const std::regex rectangle("<title>0F0,[^\n]*\n<rect x=\"([0-9.]+)\" y=\"[0-9.]+\" width=\"([0-9.]+)\"");
  std::sregex_iterator first(svg.begin(), svg.end(), rectangle), second = std::next(first);
  EXPECT_EQ((*first)[1], (*second)[1]);
  EXPECT_EQ((*first)[2], (*second)[2]);
  EXPECT_THAT([] { to_svg({}); }, ThrowsMessage<InvalidArgument>(HasSubstr("at least one timeline")));
}

}  // namespace
}  // namespace dualpipe::planner
