#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "error_of.hpp"

namespace dualpipe {
namespace {

using namespace std::string_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string csv_error(const std::string& text) {
  return test::error_of([&] { from_csv(text); });
}

TEST(Csv, EveryKindIsReadBack) {
  for (const std::string& kind : schedule_kinds()) {
    for (const auto& [ranks, micro_batches] : {std::pair{2, 4}, {4, 8}, {8, 20}, {16, 33 + 1}}) {
      const Schedule schedule = make_schedule({.kind = kind, .num_ranks = ranks, .num_micro_batches = micro_batches});
      EXPECT_EQ(from_csv(to_csv(schedule), kind), schedule) << kind << " " << ranks << " x " << micro_batches;
    }
  }
}

TEST(Csv, WritesARowPerRankAndACellPerStep) {
  Schedule schedule{.name = "hand", .num_stages = 2, .num_micro_batches = 1, .ranks = {}};
  schedule.ranks.resize(2);
  schedule.ranks[0] = {{{Pass::Forward, 0, 0}, std::nullopt}, {{Pass::Backward, 0, 0}, std::nullopt}};
  schedule.ranks[1] = {{{Pass::Forward, 1, 0}, Op{Pass::BackwardInput, 1, 0}}};
  EXPECT_EQ(to_csv(schedule), "0F0,0B0\n(1F0;1I0)OVERLAP_F_B\n");
}

// Rows as torch's schedules dump them: CRLF, idle slots as empty cells, in the middle and at both ends.
TEST(Csv, ReadsWhatTorchWrites) {
  const Schedule schedule = from_csv("0F0,0F1,,,0I0,0W0,0I1,0W1\r\n,1F0,1F1,1B0,1B1,,,\r\n");
  EXPECT_EQ(schedule.name, "custom");
  EXPECT_EQ(schedule.num_stages, 2);
  EXPECT_EQ(schedule.num_micro_batches, 2);
  ASSERT_EQ(schedule.ranks.size(), 2u);
  const auto step = [](Pass pass, int stage, int micro_batch) {
    return Step{{pass, stage, micro_batch}, std::nullopt};
  };
  EXPECT_THAT(schedule.ranks[0], ElementsAre(step(Pass::Forward, 0, 0), step(Pass::Forward, 0, 1),
                                             step(Pass::BackwardInput, 0, 0), step(Pass::BackwardWeight, 0, 0),
                                             step(Pass::BackwardInput, 0, 1), step(Pass::BackwardWeight, 0, 1)));
  EXPECT_THAT(schedule.ranks[1], ElementsAre(step(Pass::Forward, 1, 0), step(Pass::Forward, 1, 1),
                                             step(Pass::Backward, 1, 0), step(Pass::Backward, 1, 1)));
  EXPECT_THAT(violations(schedule), IsEmpty());
}

// torch dumps a schedule with its communication unless told otherwise.
TEST(Csv, SkipsWhatTorchsLoweringAdds) {
  const Schedule plain = from_csv("0F0,0B0\n1F0,1B0\n");
  EXPECT_EQ(
      from_csv("0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0RESHARD,0REDUCE_GRAD\r\n1UNSHARD,1RECV_F0,1F0,1B0,1SEND_B0\r\n"),
      plain);
  EXPECT_THAT(csv_error("0F0,SEND_F0,0B0\n"), HasSubstr("cell 2: \"SEND_F0\" has no stage"));
  EXPECT_THAT(csv_error("0F0,0SEND_X0,0B0\n"), HasSubstr("cell 2: \"0SEND_X0\" has no pass"));
  EXPECT_THAT(csv_error("0F0,0SEND_F0x,0B0\n"), HasSubstr("cell 2: \"0SEND_F0x\" has no pass"));
  EXPECT_THAT(csv_error("0UNSHARD\n"), HasSubstr("no ops"));
}

TEST(Csv, ReadsPairs) {
  const Schedule schedule =
      from_csv("0F0,3F0,0F1,3B0,(3F1;0B0)OVERLAP_F_B,3I1,3W1,0B1\r\n1F0,2F0,1F1,2F1,2B0,1B0,2B1,1B1\r\n", "hand");
  EXPECT_EQ(schedule.name, "hand");
  EXPECT_EQ(schedule.ranks[0][4], (Step{{Pass::Forward, 3, 1}, Op{Pass::Backward, 0, 0}}));
  EXPECT_EQ(schedule.num_stages, 4);
  EXPECT_THAT(violations(schedule), IsEmpty());
}

TEST(Csv, LineEndsAndBlanksDoNotMatter) {
  const Schedule plain = from_csv("0F0,0B0\n1F0,1B0\n");
  for (const std::string& text :
       {"0F0,0B0\n1F0,1B0"s, "0F0,0B0\r\n1F0,1B0\r\n"s, "0F0,0B0\r\n1F0,1B0"s, "0F0,0B0\n1F0,1B0\n\n\n"s,
        "0F0,0B0\r\n1F0,1B0\r\n\r\n"s, " 0F0 ,\t0B0 \n1F0, 1B0\n"s, ",,0F0,,,0B0,,\n,1F0,1B0,\n"s}) {
    EXPECT_EQ(from_csv(text), plain) << text;
  }
}

// As spreadsheets write them.
TEST(Csv, CellsInQuotesAndAByteOrderMark) {
  const Schedule plain = from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1B1\n");
  for (const std::string& text : {
           "\"0F0\",\"(0F1;0B0)OVERLAP_F_B\",\"0B1\"\r\n\"1F0\",\"1B0\",\"1F1\",\"1B1\"\r\n"s,
           "0F0,\"(0F1;0B0)OVERLAP_F_B\",0B1\n1F0,\"\", \"1B0\" ,\" 1F1 \",1B1,\"\""s,
           "\"0F0\",\"0SEND_F0\",(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1B1"s,
       }) {
    EXPECT_EQ(from_csv(text), plain) << text;
    EXPECT_EQ(from_csv("\xef\xbb\xbf" + text), plain) << text;
  }
  EXPECT_THAT(csv_error("\xef\xbb\xbf\r\n"), HasSubstr("no ops"));
}

TEST(Csv, OlderNotationWhereEveryBHasItsW) {
  EXPECT_EQ(from_csv("0F0,0F1,,0B0,0F2,0B1,0W0,0B2,0W1,0W2\n,1F0,1B0,1F1,1B1,1W0,1F2,1W1,1B2,1W2\n"),
            from_csv("0F0,0F1,,0I0,0F2,0I1,0W0,0I2,0W1,0W2\n,1F0,1I0,1F1,1I1,1W0,1F2,1W1,1I2,1W2\n"));
  EXPECT_EQ(from_csv("0F0,0F1,(0F2;0B0)OVERLAP_F_B,0W0,0B1,0B2,0W1,0W2\n"),
            from_csv("0F0,0F1,(0F2;0I0)OVERLAP_F_B,0W0,0I1,0I2,0W1,0W2\n"));
}

TEST(Csv, OlderNotationWithBW) {
  EXPECT_EQ(from_csv("0F0,0F1,,0B0,0SEND_F1,0BW1,0W0\n,1F0,1BW0,\"1F1\",1BW1\n"),
            from_csv("0F0,0F1,,0I0,0B1,0W0\n,1F0,1B0,1F1,1B1\n"));
  EXPECT_EQ(from_csv("0F0,(0F1;0BW0)OVERLAP_F_B,(0F2;0B1)OVERLAP_F_B,0W1,0BW2\n"),
            from_csv("0F0,(0F1;0B0)OVERLAP_F_B,(0F2;0I1)OVERLAP_F_B,0W1,0B2\n"));
  EXPECT_EQ(from_csv("0F0,0BW0\n"), from_csv("0F0,0B0\n"));
}

TEST(Csv, OlderNotationOfEveryKind) {
  for (const std::string& kind : schedule_kinds()) {
    const Schedule schedule = make_schedule({.kind = kind, .num_ranks = 4, .num_micro_batches = 8});
    std::string older;
    for (const char c : to_csv(schedule)) {
      if (c == 'I') {
        older += 'B';
      } else {
        older += c;
        if (c == 'B' && !older.ends_with("F_B")) older += 'W';
      }
    }
    EXPECT_EQ(from_csv(older, kind), schedule) << older;
  }
}

TEST(Csv, MixedNotationsNameTheCell) {
  const std::string hint = "; torch's older notation has B for the input part, each with its W, and BW for the whole";
  const std::pair<std::string, std::string> cases[] = {
      {"0F0,0F1,0B0,0W0,0B1\n", "row 1 (rank 0), cell 5: the backward has no 0W1, unlike what other cells say" + hint},
      {"0F0,0F1,0B1\n1F0,1B0,1W0\n",
       "row 2 (rank 1), cell 2: the backward has its 1W0, unlike what other cells say" + hint},
      {"0F0,0BW0,0F1,0I1,0W1\n", "row 1 (rank 0), cell 4: \"0I1\" has an I where another cell has BW" + hint},
      {"0F0,0BW0,(0F2;0I1)OVERLAP_F_B\n", "row 1 (rank 0), cell 3: \"(0F2;0I1)OVERLAP_F_B\" has an I"},
      {"0F0,0BW0,0F1,0B1\n", "row 1 (rank 0), cell 4: the backward has no 0W1, unlike what other cells say" + hint},
      {"0F0,0BW0,0W0\n", "row 1 (rank 0), cell 2: the backward has its 0W0, unlike what other cells say" + hint},
      {"0F0,0BW\n", "row 1 (rank 0), cell 2: \"0B\" has no micro-batch"},
  };
  for (const auto& [text, reason] : cases) EXPECT_THAT(csv_error(text), HasSubstr(reason)) << text;
  // With an I no B is an input part; what is wrong with 0W0 is for check() to say.
  EXPECT_EQ(from_csv("0F0,0B0,0W0,0F1,0I1,0W1\n").ranks[0][1].op.pass, Pass::Backward);
  EXPECT_EQ(from_csv("0F0,0F1,0B0,0W1\n").ranks[0][2].op.pass, Pass::Backward);
}

TEST(Csv, IdleRanksKeepTheirPlace) {
  const Schedule middle = from_csv("0F0,0B0\n\n1F0,1B0\n");
  ASSERT_EQ(middle.ranks.size(), 3u);
  EXPECT_THAT(middle.ranks[1], IsEmpty());
  Schedule last = from_csv("0F0,0B0\n,,\n");
  EXPECT_EQ(last.ranks.size(), 2u);
  last.ranks.emplace_back();
  EXPECT_EQ(from_csv(to_csv(last)), last);
}

TEST(Csv, BadCellsAreNamedByRowAndCell) {
  const std::string good = "0F0,0F1,0B0,0B1\n";
  const std::pair<std::string, std::string> cases[] = {
      {good + "1F0,1F1,1B0,1X1\n", "row 2 (rank 1), cell 4: \"1X1\" has no pass"},
      {good + "1F0,,1F1,garbage,1B1\n", "row 2 (rank 1), cell 4: \"garbage\" has no stage"},
      {good + "1F0,1F1,1B0,1B\n", "row 2 (rank 1), cell 4: \"1B\" has no micro-batch"},
      {good + "1F0,1F1,(1F0;1", "row 2 (rank 1), cell 3: \"(1F0;1\" opens a pair"},
      {good + "1F0,1F1 1B0,1B1\n", "row 2 (rank 1), cell 2: \"1F1 1B0\" goes on"},
      {good + "1F0,1F99999999999999999999,1B0\n", "row 2 (rank 1), cell 2"},
      {good + "1F0,2147483648F1,1B0\n", "a stage that is too large"},
      {good + "1F0,1F1\0,1B0\n"s, "row 2 (rank 1), cell 2: \"1F1\\x00\" goes on"},
      {"0F0,\0,0B0\n"s, "row 1 (rank 0), cell 2: \"\\x00\" has no stage"},
      {"\x7f"
       "ELF\x02\x01",
       "row 1 (rank 0), cell 1: \"\\x7fELF"},
      {"0F0;0B0\n", "row 1 (rank 0), cell 1: \"0F0;0B0\" goes on"},
      {"rank,step\n0,1\n", "row 1 (rank 0), cell 1: \"rank\" has no stage"},
      {good + "1F0,\"1F1,1B0\n", "row 2 (rank 1), cell 2: \"\"1F1,1B0\" has no closing quote in its row"},
      {good + "1F0,\"1F1\"x,1B0\n", "row 2 (rank 1), cell 2: \"\"1F1\"x\" goes on after its closing quote"},
      {good + "1F0,\"1F1,1B0\",1B1\n", "row 2 (rank 1), cell 2: \"1F1,1B0\" goes on after its micro-batch"},
      {good + "1F0,\"1F1\"\"\",1B0\n", "row 2 (rank 1), cell 2: \"1F1\"\" goes on after its micro-batch"},
      {good + "1F0,1\"F1\",1B0\n", "row 2 (rank 1), cell 2: \"1\"F1\"\" has no pass"},
      {good + "\xef\xbb\xbf" + "1F0\n", "row 2 (rank 1), cell 1: \"\\xef\\xbb\\xbf1F0\" has no stage"},
      {"", "no ops"},
      {"\n\n", "no ops"},
      {",,,\r\n,,,\r\n", "no ops"},
  };
  for (const auto& [text, reason] : cases) EXPECT_THAT(csv_error(text), HasSubstr(reason)) << text;
}

// A table over stages and micro-batches must not become larger than the file.
TEST(Csv, NumbersThatTheFileCannotFillAreRefused) {
  EXPECT_THAT(csv_error("0F0,0B0\n2000000000F0,1B0\n"),
              HasSubstr("row 2 (rank 1), cell 1: stage 2000000000 in a schedule of only 4 ops"));
  EXPECT_THAT(csv_error("0F0,0B0,,0F2147483647\n"),
              HasSubstr("row 1 (rank 0), cell 4: micro-batch 2147483647 in a schedule of only 3 ops"));
  EXPECT_THAT(csv_error("1F0\n"), HasSubstr("stage 1 in a schedule of only 1 op;"));
}

TEST(Csv, AMillionCellsAreRead) {
  constexpr int num_ranks = 64;
  constexpr int num_micro_batches = 8192;
  const std::string text =
      to_csv(make_schedule({.kind = "1f1b", .num_ranks = num_ranks, .num_micro_batches = num_micro_batches}));
  const Schedule schedule = from_csv(text);
  EXPECT_THAT(violations(schedule), IsEmpty());
  EXPECT_EQ(schedule.num_micro_batches, num_micro_batches);
}

TEST(Csv, GarbageOfAMillionCellsIsRefused) {
  std::string text;
  for (int i = 0; i < 1000000; ++i) text += std::to_string(i % 1000) + "F" + std::to_string(i) + ",";
  EXPECT_THROW(check(from_csv(text)), InvalidArgument);
}

TEST(Queries, SayWhichRankHoldsWhat) {
  const Schedule schedule = make_schedule({.kind = "dualpipe", .num_ranks = 4, .num_micro_batches = 8});
  EXPECT_EQ(rank_of(schedule, 1, 0), 1);
  EXPECT_EQ(rank_of(schedule, 1, 4), 2);
  EXPECT_THAT(holders(schedule, 0), ElementsAre(0, 3));
  EXPECT_THAT(holders(schedule, 2), ElementsAre(1, 2));
  EXPECT_THAT(stages_of(schedule, 3), ElementsAre(0, 3));
  EXPECT_THAT(holders(schedule, 4), IsEmpty());
  EXPECT_THROW(rank_of(schedule, 4, 0), InvalidArgument);
  EXPECT_THROW(rank_of(schedule, 0, 8), InvalidArgument);
  EXPECT_THROW(stages_of(schedule, 4), InvalidArgument);
  EXPECT_THROW(stages_of(schedule, -1), InvalidArgument);

  const Schedule folded = make_schedule({.kind = "dualpipev", .num_ranks = 4, .num_micro_batches = 8});
  EXPECT_THAT(holders(folded, 5), ElementsAre(2));
  EXPECT_THAT(stages_of(folded, 3), ElementsAre(3, 4));
}

TEST(Queries, PlacementIsRankOfAsATable) {
  for (const std::string& kind : schedule_kinds()) {
    const Schedule schedule = make_schedule({.kind = kind, .num_ranks = 4, .num_micro_batches = 8});
    const std::vector<int> ranks = placement(schedule);
    ASSERT_EQ(ranks.size(), static_cast<std::size_t>(schedule.num_stages * 8));
    for (int s = 0; s < schedule.num_stages; ++s)
      for (int m = 0; m < 8; ++m)
        EXPECT_EQ(ranks[static_cast<std::size_t>(s * 8 + m)], rank_of(schedule, s, m)) << kind;
  }
  EXPECT_THAT(placement(from_csv("0F0,0B0\n1F1,1B1\n")), ElementsAre(0, -1, -1, 1));
  EXPECT_THROW(placement(from_csv("0F0\n1F1\n")), InvalidArgument);  // a larger table than the schedule has ops
}

}  // namespace
}  // namespace dualpipe
