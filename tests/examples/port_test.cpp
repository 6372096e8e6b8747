// The port of an ordinary program to a pipeline: it takes few lines, docs/porting.md explains all of them, and both
// programs learn the same.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "launch/process.hpp"
#include "temporary_folder.hpp"

namespace dualpipe {
namespace {

using ::testing::HasSubstr;
using testing::Process;

const std::string kSource = DUALPIPE_SOURCE;

/// Lines that one of the programs has and the other has not, as a unified diff marks them.
std::vector<std::string> differing_lines() {
  Process diff({"diff", kSource + "/examples/port/single.cpp", kSource + "/examples/port/pipeline.cpp"});
  EXPECT_EQ(diff.wait(), 1) << diff.err();
  std::vector<std::string> lines;
  std::istringstream text(diff.out());
  for (std::string line; std::getline(text, line);)
    if (line.starts_with("< ") || line.starts_with("> "))
      lines.push_back((line[0] == '<' ? "-" : "+") + line.substr(2));
  return lines;
}

TEST(Port, TakesFewLinesAndEachIsExplained) {
  const std::vector<std::string> lines = differing_lines();
  std::string all;
  for (const std::string& line : lines) all += line + "\n";
  EXPECT_LE(lines.size(), 30u) << all;
  EXPECT_GE(lines.size(), 10u) << all;
  const std::string page = detail::read_file(kSource + "/docs/porting.md");
  for (const std::string& line : lines) EXPECT_NE(page.find("\n" + line + "\n"), std::string::npos) << line;
  EXPECT_THAT(page, HasSubstr("\n" + std::to_string(lines.size()) + " lines"));
}

struct Result {
  double loss = 0, accuracy = 0;
};
/// By epoch and part of the data, as in {3, "test"}.
using Results = std::map<std::pair<int, std::string>, Result>;

Results results(const std::vector<std::string>& command) {
  Process process(command, {{"OMP_NUM_THREADS", "1"}});
  EXPECT_EQ(process.wait(), 0) << process.out() << process.err();
  const std::string text = process.out();
  Results found;
  const std::regex line("epoch ([0-9]+)  (test|train) +loss ([0-9.]+)  accuracy ([0-9.]+)");
  for (std::sregex_iterator it(text.begin(), text.end(), line), end; it != end; ++it)
    found[{std::stoi((*it)[1]), (*it)[2]}] = {std::stod((*it)[3]), std::stod((*it)[4])};
  return found;
}

Results single(const std::string& folder, int begin, int end) {
  return results({DUALPIPE_PORT_SINGLE, folder, std::to_string(begin), std::to_string(end)});
}
Results pipeline(int ranks, const std::string& folder, int begin, int end) {
  return results({DUALPIPE_RUN, "-n", std::to_string(ranks), "--", DUALPIPE_PORT, folder, std::to_string(begin),
                  std::to_string(end)});
}

/// Expects that `part` is a stretch of `whole`.
void expect_near(const Results& part, const Results& whole, double loss, double accuracy) {
  for (const auto& [key, result] : part) {
    SCOPED_TRACE(key.second + " of epoch " + std::to_string(key.first));
    ASSERT_TRUE(whole.count(key));
    EXPECT_NEAR(result.loss, whole.at(key).loss, loss);
    EXPECT_NEAR(result.accuracy, whole.at(key).accuracy, accuracy);
  }
}

TEST(Port, LearnsAsTheProgramInOneProcess) {
  const test::TemporaryFolder folder;
  const std::string one = folder / "one", two = folder / "two", four = folder / "four";
  const int epochs = 6;
  const Results alone = single(one, 0, epochs);
  const Results on_two = pipeline(2, two, 0, epochs);
  ASSERT_EQ(alone.size(), 2u * epochs + 1);
  ASSERT_EQ(on_two.size(), alone.size());

  // It begins with the same weights, sees the same batches, and learns as well. Dropout draws other numbers, and a norm
  // sees a micro-batch instead of a batch.
  const auto& first = on_two.at({0, "test"});
  EXPECT_NEAR(first.loss, alone.at({0, "test"}).loss, 1e-5);
  EXPECT_EQ(first.accuracy, alone.at({0, "test"}).accuracy);
  EXPECT_NEAR(on_two.at({epochs, "train"}).loss, alone.at({epochs, "train"}).loss, 0.2);
  EXPECT_NEAR(on_two.at({epochs, "test"}).loss, alone.at({epochs, "test"}).loss, 0.1);
  EXPECT_NEAR(on_two.at({epochs, "test"}).accuracy, alone.at({epochs, "test"}).accuracy, 0.03);
  for (const Results& result : {alone, on_two}) {
    EXPECT_LT(first.accuracy, 0.5);
    EXPECT_GT(result.at({epochs, "test"}).accuracy, 0.9);
  }

  // Four ranks do what two do, to the rounding of other orders of sums, and either goes on from what the other saved.
  expect_near(pipeline(4, four, 0, 3), on_two, 1e-3, 0.005);
  expect_near(pipeline(2, four, 3, 4), on_two, 1e-3, 0.005);
  expect_near(single(one, epochs, epochs), alone, 0, 0);
}

}  // namespace
}  // namespace dualpipe
