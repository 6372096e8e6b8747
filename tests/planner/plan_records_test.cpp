// dualpipe-plan report of records that were written by hand: which rank was behind.
#include <sys/stat.h>

#include <nlohmann/json.hpp>
#include <string>

#include "plan_tool.hpp"

namespace dualpipe::planner {
namespace {

using nlohmann::json;
using testing::HasSubstr;

/// Begins the record of a rank of three, whose clock showed `written` ms when it was `since_1970` ms.
std::string record(int rank, int written, int since_1970, const std::string& operations,
                   const std::string& failure = "", bool threw = false) {
  return R"({"format":"dualpipe record","version":1,"rank":)" + std::to_string(rank) +
         R"(,"ranks":[0,1,2],"run":77,"schedule":"1f1b","stages":3,"micro_batches":4,"step":3,"failure":")" + failure +
         R"(","threw":)" + (threw ? "true" : "false") + R"(,"written_ns":)" + std::to_string(written) +
         R"(000000,"unix_ns":)" + std::to_string(since_1970) + R"(000000,"operations":[)" + operations + "]}";
}

/// Times in ms; -1: it has not come so far.
std::string operation(const std::string& what, int issued, int began = -1, int ended = -1) {
  std::string text = "{" + what + R"(,"step":3,"issued_ns":)" + std::to_string(issued) + "000000";
  if (began >= 0) text += R"(,"began_ns":)" + std::to_string(began) + "000000";
  if (ended >= 0) text += R"(,"ended_ns":)" + std::to_string(ended) + "000000";
  return text + "}";
}
std::string compute(const std::string& op) { return R"("do":"compute","op":")" + op + '"'; }
std::string receive(const std::string& op, int peer) {
  return R"("do":"receive","op":")" + op + R"(","peer":)" + std::to_string(peer) + R"(,"bytes":96)";
}
std::string send(const std::string& op, int peer) {
  return R"("do":"send","op":")" + op + R"(","peer":)" + std::to_string(peer) + R"(,"bytes":96)";
}
std::string together(const std::string& name, int number) {
  return R"("do":"together","name":")" + name + R"(","number":)" + std::to_string(number);
}

const std::string begins = operation(together("begin of step()", 9), 1000, 1000, 1010) + ",";

class PlanRecords : public PlanTool {
 protected:
  /// Rank 1 hangs in 1F0 until the others have given up at 6000 ms of the common clock. Its own clock runs 500 ms
  /// behind, and it goes on after that.
  void write_hang() const {
    write("records/rank-0.json",
          record(0, 6000, 6000,
                 begins + operation(compute("0F0"), 1010, 1010, 1030) + "," + operation(receive("1I0", 1), 1031, 1032) +
                     "," + operation(send("0F0", 1), 1031),
                 "rank 0: receive from rank 1: waited for rank 1"));
    write("records/rank-1.json",
          record(1, 9500, 10000,
                 operation(together("begin of step()", 9), 500, 500, 510) + "," +
                     operation(receive("0F0", 0), 510, 511, 532) + "," + operation(compute("1F0"), 532, 532, 9490) +
                     "," + operation(receive("2I0", 2), 9491, 9492),
                 "rank 1: receive from rank 2: failed because of rank 0"));
    write("records/rank-2.json", record(2, 6001, 6001, begins + operation(receive("1F0", 1), 1011, 1012)));
  }
  void SetUp() override { fs::create_directory(folder_ / "records"); }
};

TEST_F(PlanRecords, NameTheRankThatHangs) {
  write_hang();
  EXPECT_EQ(output("report records"), read(fs::path(DUALPIPE_GOLDENS) / "records_straggler.txt"));
  EXPECT_EQ(output("report records/rank-2.json records/rank-0.json records/rank-1.json"), output("report records"));
  const json report = json_of("report records");
  EXPECT_EQ(report["stragglers"], json({1}));
  EXPECT_EQ(report["ranks"][0], (json{{"rank", 0},
                                      {"recorded", true},
                                      {"step", 3},
                                      {"last", "compute 0F0"},
                                      {"now", "receive 1I0 from rank 1, 96 bytes"},
                                      {"seconds", 4.968},
                                      {"waits_for", {1}}}));
  EXPECT_EQ(report["ranks"][1]["now"], "compute 1F0");
  EXPECT_EQ(report["ranks"][1]["waits_for"], json::array());
}

TEST_F(PlanRecords, NameTheRankThatThrew) {
  write_hang();
  write("records/rank-1.json", record(1, 6000, 6000, begins + operation(compute("(1F1;1B0)OVERLAP_F_B"), 1020, 1020),
                                      "rank 1: forward of stage 1, micro-batch 1: boom\\n  cells", true));
  EXPECT_THAT(output("report records"),
              HasSubstr("Rank 1 was behind: others wait for it, directly or not, and it waits for nobody; it was in "
                        "compute 1F1&1B0 for 4.980 s. It failed: rank 1: forward of stage 1, micro-batch 1: boom.\n"));
}

TEST_F(PlanRecords, NameTheRankThatThrewWhoeverWaits) {
  const auto write_record = [&](int rank, const std::string& operations, const std::string& failure, bool threw) {
    write("records/rank-" + std::to_string(rank) + ".json",
          record(rank, 6000 - rank, 6000 - rank, begins + operations, failure, threw));
  };
  const std::string heard = "rank 0: failed because of rank 2: forward of stage 2: no heads";
  const std::string thrown = "forward of stage 2: no heads\\n  cells";
  for (int rank = 0; rank < 2; ++rank) write_record(rank, operation(compute("0F1"), 1020, 1020), heard, false);
  write_record(2, operation(compute("2F0"), 1020, 1020), thrown, true);
  EXPECT_THAT(output("report records"),
              HasSubstr("\nRank 2 failed: forward of stage 2: no heads. No rank waits for another.\n"));
  write_record(0, operation(receive("1I0", 1), 1020, 1020), heard, false);
  EXPECT_THAT(output("report records"),
              HasSubstr("\nRank 2 failed: forward of stage 2: no heads. Rank 1 was behind: others wait for it"));
  write_record(1, operation(receive("2I0", 2), 1020, 1020), "no tails", true);
  EXPECT_THAT(output("report records"),
              HasSubstr("\nRank 2 failed: forward of stage 2: no heads; so did rank 1. Rank 2 was behind: "));
}

TEST_F(PlanRecords, NameARankThatHasNotComeToWhatRanksDoTogether) {
  write("records/rank-0.json", record(0, 6000, 6000, begins + operation(together("vote", 10), 2000, 2000)));
  write("records/rank-2.json", record(2, 6000, 6000, begins + operation(together("vote", 10), 2000, 2000)));
  write("records/rank-1.json", record(1, 6000, 6000, begins + operation(compute("1B3"), 1020, 1020, 1500)));
  EXPECT_THAT(output("report records"),
              HasSubstr("Rank 1 was behind: others wait for it, directly or not, and it waits "
                        "for nobody; it ran code outside of the pipeline for 4.500 s, since "
                        "compute 1B3."));
  // All have come to it.
  write("records/rank-1.json", record(1, 6000, 6000, begins + operation(together("vote", 10), 3000, 3000)));
  EXPECT_THAT(output("report records"), HasSubstr("Which rank was behind is not known: ranks 0, 1 and 2 wait"));
}

TEST_F(PlanRecords, ThatWaitForEachOther) {
  write_hang();
  write("records/rank-1.json", record(1, 6000, 6000, begins + operation(receive("2I0", 2), 1020, 1020)));
  EXPECT_THAT(output("report records"),
              HasSubstr("No rank was behind: ranks 1 and 2 wait for each other; rank 1 in receive 2I0 from rank 2, 96 "
                        "bytes; rank 2 in receive 1F0 from rank 1, 96 bytes.\n"));
  EXPECT_EQ(json_of("report records")["stragglers"], json::array());
}

TEST_F(PlanRecords, OfRanksThatDoNotWait) {
  for (int rank = 0; rank < 3; ++rank)
    write("records/rank-" + std::to_string(rank) + ".json", record(rank, 6000, 6000, ""));
  EXPECT_THAT(output("report records"), HasSubstr("No rank waits for another.\n"));
}

TEST_F(PlanRecords, OfWhichOneIsMissing) {
  write_hang();
  fs::remove(folder_ / "records" / "rank-1.json");
  expect_refused("report records", 1,
                 "there is no record of rank 1 of 3 ranks; one that was killed, that failed outside of the pipeline");
  EXPECT_THAT(output("report records --incomplete"),
              HasSubstr("Rank 1 was behind: others wait for it, directly or not, and it waits for nobody; there is no "
                        "record of it, as of a rank that was killed, failed outside of the pipeline or never "
                        "returned.\n"));
}

TEST_F(PlanRecords, ThatAreWrong) {
  expect_refused("report records", 1, "there is no record in records: no file rank-<number>.json");
  write_hang();
  const auto refused = [&](const std::string& text, const std::string& message) {
    write("records/rank-1.json", text);
    expect_refused("report records", 1, message);
  };
  const std::string good = record(1, 6000, 6000, begins + operation(receive("2I0", 2), 1020, 1020));
  const auto with = [&](const std::string& what, const std::string& other) {
    std::string text = good;
    return text.replace(text.find(what), what.size(), other);
  };
  refused(good.substr(0, good.size() / 2), "records/rank-1.json: not JSON");
  refused("", "records/rank-1.json: not JSON");
  refused("[]", "records/rank-1.json: not a record of a rank");
  refused(with("\"version\":1", "\"version\":2"),
          "records/rank-1.json: the record has version 2, this program reads version 1");
  refused(with("\"run\":77", "\"run\":78"), "the records of ranks 0 and 1 are of different runs");
  refused(with("\"rank\":1", "\"rank\":0"), "there are two records of rank 0");
  refused(with("\"rank\":1", "\"rank\":7"), "\"ranks\" must name rank 7");
  refused(with("\"peer\":2", "\"peer\":-2"), "operation 1: \"peer\" must be a whole number from 0 on, got -2");
  refused(with("\"run\":77", "\"run\":18446744073709551615"), "\"run\" must be a whole number from 0 on");
  refused(with("2I0", "2X0"), "operation 1: ");
  refused(with("\"threw\":false", "\"threw\":1"), "\"threw\" must be true or false, got 1");
  refused(with("\"do\":\"receive\"", "\"do\":\"sleep\""), "operation 1: \"do\" is \"sleep\"");
  refused(with("\"schedule\":\"1f1b\",", ""), "the record lacks \"schedule\"");
  write("records/rank-1.json", good);
  expect_refused("report records --format svg", 1, "a report of records is text or json, not svg");
}

TEST_F(PlanRecords, WriteNothingButTextOnATerminal) {
  write_hang();
  std::string text = read(folder_ / "records/rank-0.json");
  text.replace(text.find("1f1b"), 4, R"(\u001b[2J\u009bx)");
  write("records/rank-0.json", text);
  EXPECT_THAT(output("report records"), testing::StartsWith("?[2J??x: records of 3 ranks"));
}

TEST_F(PlanRecords, AreRegularFiles) {
  write_hang();
  ASSERT_EQ(mkfifo((folder_ / "records" / "rank-7.json").c_str(), 0600), 0);
  expect_refused("report records", 1, "records/rank-7.json is no regular file, so no record; remove it");
}

TEST_F(PlanRecords, AreNoTraces) {
  output("simulate --ranks 2 --microbatches 2 --format trace --output trace.json");
  expect_refused("report trace.json --incomplete", 1, "--incomplete is for records");
}

}  // namespace
}  // namespace dualpipe::planner
