// Runs as lines of JSON, and their picture.
#include "dualpipe/planner/run_log.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "error_of.hpp"

namespace dualpipe::planner {
namespace {

using test::error_of;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

using Points = std::vector<std::pair<double, double>>;

/// The curves of a picture, in the order in which they are drawn.
std::vector<Points> curves(const std::string& svg) {
  const std::string begin = "<polyline points=\"";
  std::vector<Points> found;
  for (std::size_t at = svg.find(begin); at != std::string::npos; at = svg.find(begin, at + 1)) {
    const std::size_t first = at + begin.size();
    std::istringstream text(svg.substr(first, svg.find('"', first) - first));
    Points& points = found.emplace_back();
    char comma = 0;
    for (double x = 0, y = 0; text >> x >> comma >> y;) points.emplace_back(x, y);
  }
  return found;
}

TEST(RunLog, MissingAndNullValuesAreGaps) {
  const RunLog log = read_run_log(
      "{\"step\": 0, \"loss\": 2}\n{\"step\": 2, \"loss\": null, \"norm\": 1e-3}\r\n{\"loss\": 1, \"step\": 7}", "run");
  EXPECT_EQ(log.name, "run");
  EXPECT_THAT(log.steps, ElementsAre(0, 2, 7));
  EXPECT_THAT(log.values.at("loss"), ElementsAre(2, ::testing::IsNan(), 1));
  EXPECT_THAT(log.values.at("norm"), ElementsAre(::testing::IsNan(), 1e-3, ::testing::IsNan()));
  EXPECT_TRUE(read_run_log("", "empty").steps.empty());
}

TEST(RunLog, ErrorsNameTheLine) {
  const auto error = [](const std::string& second) {
    return error_of([&] { read_run_log("{\"step\": 5}\n" + second + "\n", "run.jsonl"); });
  };
  EXPECT_THAT(error("{\"step\": 5}"), HasSubstr("run.jsonl, line 2: step 5 comes after step 5"));
  EXPECT_THAT(error("{\"step\": -1}"), AllOf(HasSubstr("line 2"), HasSubstr("-1")));
  EXPECT_THAT(error("{\"step\": 6.5}"), HasSubstr("6.5"));
  EXPECT_THAT(error("{\"loss\": 6}"), HasSubstr("an object with a step"));
  EXPECT_THAT(error("[]"), HasSubstr("an object with a step"));
  EXPECT_THAT(error(""), HasSubstr("line 2: not JSON"));
  EXPECT_THAT(error("{\"step\": 6, \"loss\": \"1\"}"), AllOf(HasSubstr("\"loss\""), HasSubstr("number or null")));
  EXPECT_THAT(error("{\"step\": 6, \"step\": 7}"), HasSubstr("twice"));
  EXPECT_THAT(error("{\"step\": 6"), HasSubstr("not JSON"));
}

TEST(RunLog, APictureShowsLossesAboveRateAndNorm) {
  const RunLog run{
      "a <run>",
      {0, 5, 10},
      {{"loss", {3, 1, 2}}, {"learning_rate", {0.1, 0.2, 0.1}}, {"gradient_norm", {1, 1, 1}}, {"other", {1, 2, 3}}}};
  const std::string svg = to_svg({run});
  EXPECT_THAT(svg, AllOf(HasSubstr(">loss<"), HasSubstr(">learning rate<"), HasSubstr(">gradient norm<"),
                         HasSubstr("a &lt;run&gt;"), HasSubstr(">2.5<"), HasSubstr(">0.15<"), Not(HasSubstr("other"))));
  const auto drawn = curves(svg);
  ASSERT_EQ(drawn.size(), 3u);
  for (const Points& points : drawn) {
    ASSERT_EQ(points.size(), 3u);
    EXPECT_NEAR(points[1].first - points[0].first, points[2].first - points[1].first, 0.02) << "steps are equally far";
  }
  // Greater values are higher up.
  EXPECT_NEAR(drawn[0][1].second - drawn[0][0].second, 2 * (drawn[0][1].second - drawn[0][2].second), 0.05);
  EXPECT_GT(drawn[0][1].second, drawn[0][0].second);
  EXPECT_LT(drawn[1][1].second, drawn[1][0].second);
  EXPECT_EQ(drawn[2][0].second, drawn[2][2].second);
  EXPECT_GT(drawn[1][0].second, drawn[0][1].second) << "it is below";
}

TEST(RunLog, SeveralRunsShareTheirAxes) {
  const RunLog first{"first", {1, 2}, {{"loss", {4, 2}}}}, second{"second", {1, 2, 3}, {{"loss", {4, 3, 2}}}};
  const std::string svg = to_svg({first, second});
  const auto drawn = curves(svg);
  ASSERT_EQ(drawn.size(), 2u);
  EXPECT_EQ(drawn[0][0], drawn[1][0]);
  EXPECT_EQ(drawn[0][1].second, drawn[1][2].second);
  EXPECT_EQ(drawn[0][1].first, drawn[1][1].first);
  EXPECT_THAT(svg, AllOf(HasSubstr(">first<"), HasSubstr(">second<"), Not(HasSubstr("learning rate"))));
}

TEST(RunLog, GapsDivideACurveAndSinglePointsAreSeen) {
  const double gap = std::numeric_limits<double>::quiet_NaN();
  const auto drawn = curves(to_svg({{"run", {1, 2, 3, 4}, {{"loss", {1, 2, gap, 3}}}}}));
  ASSERT_EQ(drawn.size(), 2u);
  EXPECT_EQ(drawn[0].size(), 2u);
  EXPECT_EQ(drawn[1].size(), 2u);
  EXPECT_EQ(curves(to_svg({{"run", {8}, {{"loss", {1}}}}})).size(), 1u);
  EXPECT_THAT(error_of([&] { to_svg({{"run", {1}, {{"loss", {gap}}}}}); }), HasSubstr("nothing to draw"));
  EXPECT_THAT(error_of([] { to_svg(std::vector<RunLog>{}); }), HasSubstr("nothing to draw"));
  EXPECT_THAT(error_of([] { to_svg({{"run", {1}, {{"loss", {1e308}}}}}); }), HasSubstr("cannot draw values of loss"));
}

TEST(RunLog, LongRunsKeepTheirPeaks) {
  RunLog run{"run", {}, {}};
  for (int step = 0; step < 100'000; ++step) {
    run.steps.push_back(step);
    run.values["loss"].push_back(step == 54'321 ? 9 : step == 12'345 ? -9 : std::sin(step));
  }
  const std::string svg = to_svg({run});
  EXPECT_LT(svg.size(), 200'000u);
  const auto drawn = curves(svg);
  ASSERT_EQ(drawn.size(), 1u);
  double high = 1e9, low = 0, quarter = 0;
  for (const auto& [x, y] : drawn[0]) {
    high = std::min(high, y);
    low = std::max(low, y);
  }
  for (const auto& [x, y] : drawn[0]) quarter += y < high + (low - high) * 0.25 ? 1 : 0;
  EXPECT_EQ(quarter, 1) << "one value alone is so high";
}

}  // namespace
}  // namespace dualpipe::planner
