#include "tools/run/lines.hpp"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace dualpipe::run {
namespace {

using namespace std::chrono_literals;
const LineLabeller::Clock::time_point start{1000s};

TEST(LineLabeller, LabelsWholeLinesOnly) {
  LineLabeller lines("[3] ");
  EXPECT_EQ(lines.feed("one\ntw", start), "[3] one\n");
  EXPECT_EQ(lines.feed("o\n\nthree", start), "[3] two\n[3] \n");
  EXPECT_EQ(lines.finish(), "[3] three\n");
  EXPECT_EQ(lines.finish(), "");
}

TEST(LineLabeller, ShowsWhatATerminalWouldStillShow) {
  LineLabeller lines("");
  EXPECT_EQ(lines.feed("10%\r50%\r100%\n", start), "100%\n");
  EXPECT_EQ(lines.feed("from DOS\r\nagain\r\n", start), "from DOS\nagain\n");
}

TEST(LineLabeller, ShowsProgressOnceASecond) {
  LineLabeller lines("> ");
  EXPECT_EQ(lines.feed("1%\r", start), "> 1%\n");
  EXPECT_EQ(lines.feed("2%\r", start + 10ms), "");
  EXPECT_EQ(lines.feed("3%\r4%", start + 20ms), "");
  EXPECT_EQ(lines.feed("\r5", start + 1100ms), "> 4%\n");
  EXPECT_EQ(lines.feed("%\r\n", start + 1200ms), "> 5%\n");
}

TEST(LineLabeller, OverwritesProgressOnATerminal) {
  LineLabeller lines("> ", true);
  const auto row = [](const std::string& text) { return "\033[K\033[?7l> " + text + "\033[?7h\r"; };
  EXPECT_EQ(lines.feed("begin\n1%\r", start), "\033[K> begin\n" + row("1%"));
  EXPECT_EQ(lines.feed("2%\r3%\r", start), row("3%"));
  EXPECT_EQ(lines.feed("warning\n4%\r", start), "\033[K> warning\n" + row("4%"));
  EXPECT_EQ(lines.feed("\n", start), "\033[K> 4%\n") << "the last one stays";
  EXPECT_EQ(lines.feed("5%\r", start), row("5%"));
  EXPECT_EQ(lines.finish(), "\033[K> 5%\n");
}

TEST(LineLabeller, DoesNotShowALineTwiceWhenItsNewlineComesLate) {
  LineLabeller lines("");
  EXPECT_EQ(lines.feed("100%\r", start), "100%\n");
  EXPECT_EQ(lines.feed("\nnext\n", start), "next\n");
  LineLabeller returns("");
  EXPECT_EQ(returns.feed("100%\r", start), "100%\n");
  EXPECT_EQ(returns.finish(), "");
}

TEST(LineLabeller, BoundsWhatItHoldsBack) {
  LineLabeller lines("");
  const std::string block(1 << 19, 'x');
  std::size_t shown = 0;
  for (int i = 0; i < 8; ++i) shown += lines.feed(block, start).size();
  EXPECT_GE(shown, std::size_t{1} << 20);
}

TEST(LineLabeller, DoesNotDependOnHowTheBytesAreCut) {
  constexpr unsigned seed = 20240607;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  std::string text;
  for (int i = 0; i < 500; ++i) text += std::string(random() % 20, static_cast<char>('a' + i % 26)) + "\n";
  LineLabeller whole("#");
  const std::string expected = whole.feed(text, start) + whole.finish();
  for (int round = 0; round < 50; ++round) {
    LineLabeller pieces("#");
    std::string got;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t size = 1 + random() % 40;
      got += pieces.feed(std::string_view(text).substr(at, size), start);
      at += size;
    }
    EXPECT_EQ(got + pieces.finish(), expected);
  }
}

}  // namespace
}  // namespace dualpipe::run
