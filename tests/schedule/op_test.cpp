#include "dualpipe/schedule/op.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <unordered_set>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace {

using ::testing::HasSubstr;

TEST(Op, HasTheTextFormOfTorchPipelining) {
  EXPECT_EQ(to_string(Op{Pass::Forward, 2, 0}), "2F0");
  EXPECT_EQ(to_string(Op{Pass::BackwardInput, 0, 13}), "0I13");
  EXPECT_EQ(to_string(Op{Pass::BackwardWeight, 15, 7}), "15W7");
  EXPECT_EQ(to_string(Op{Pass::Backward, 7, 19}), "7B19");
  EXPECT_EQ(to_string(Step{{Pass::Forward, 0, 7}, Op{Pass::Backward, 7, 3}}), "(0F7;7B3)OVERLAP_F_B");
  EXPECT_EQ(to_string(Step{{Pass::Forward, 0, 7}, std::nullopt}), "0F7");
}

TEST(Op, IsReadBack) {
  const int large = std::numeric_limits<int>::max();
  for (const Pass pass : {Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight, Pass::Backward}) {
    for (const int stage : {0, 1, 10, 127, large}) {
      for (const int micro_batch : {0, 3, 99, large}) {
        const Op op{pass, stage, micro_batch};
        EXPECT_EQ(parse_op(to_string(op)), op);
        EXPECT_EQ(parse_step(to_string(op)), (Step{op, std::nullopt}));
        const Step pair{op, Op{Pass::BackwardInput, micro_batch, stage}};
        EXPECT_EQ(parse_step(to_string(pair)), pair);
      }
    }
  }
}

TEST(Op, LeadingZerosAreRead) { EXPECT_EQ(parse_op("002F010"), (Op{Pass::Forward, 2, 10})); }

TEST(Op, HashTellsTheOpsOfAScheduleApart) {
  std::unordered_set<Op> ops;
  for (const Pass pass : {Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight, Pass::Backward})
    for (int stage = 0; stage < 8; ++stage)
      for (int micro_batch = 0; micro_batch < 20; ++micro_batch) ops.insert({pass, stage, micro_batch});
  EXPECT_EQ(ops.size(), 4u * 8 * 20);
  EXPECT_TRUE(ops.contains({Pass::Backward, 7, 19}));
  EXPECT_FALSE(ops.contains({Pass::Backward, 8, 19}));
}

struct BadText {
  std::string text;
  std::string reason;
};

TEST(Op, BadTextIsRefusedWithTheTextAndTheReason) {
  using namespace std::string_literals;
  const BadText cases[] = {
      {"", "\"\" has no stage"},
      {"F0", "\"F0\" has no stage"},
      {"-1F0", "\"-1F0\" has no stage"},
      {"+1F0", "has no stage"},
      {" 1F0", "has no stage"},
      {"2", "\"2\" ends before its pass"},
      {"2X0", "\"2X0\" has no pass that is known here"},
      {"2f0", "no pass"},
      {"2F", "\"2F\" has no micro-batch"},
      {"2F-1", "no micro-batch"},
      {"2F0x", "\"2F0x\" goes on after its micro-batch"},
      {"2F0 ", "goes on"},
      {"2F0.5", "goes on"},
      {"2147483648F0", "a stage that is too large"},
      {"0B2147483648", "a micro-batch that is too large"},
      {"99999999999999999999999999F0", "a stage that is too large"},
      {"0F18446744073709551616", "a micro-batch that is too large"},
      {"2SEND_F0", "no pass"},
      {"2UNSHARD", "no pass"},
      {"2F\0"s + "0", "\"2F\\x000\" has no micro-batch"},
      {"\xef\xbb\xbf"s + "0F0", "\"\\xef\\xbb\\xbf0F0\""},
  };
  for (const auto& [text, reason] : cases) {
    SCOPED_TRACE(text);
    try {
      parse_op(text);
      ADD_FAILURE() << "was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(), HasSubstr(reason));
    }
    EXPECT_THROW(parse_step(text), InvalidArgument);
  }
}

TEST(Step, BadPairsAreRefusedWithTheTextAndTheReason) {
  const BadText cases[] = {
      {"(0F7;7B3)", "does not end in )OVERLAP_F_B"},
      {"(0F7;7B3)OVERLAP_F_", "does not end"},
      {"(0F7;7B3", "does not end"},
      {"(", "does not end"},
      {"()OVERLAP_F_B", "not a pair of two ops"},
      {"(0F7)OVERLAP_F_B", "not a pair of two ops"},
      {"(0F7;7B3;1W0)OVERLAP_F_B", "not a pair of two ops"},
      {"(;7B3)OVERLAP_F_B", "no stage"},
      {"(0F7;)OVERLAP_F_B", "no stage"},
      {"((0F7;7B3)OVERLAP_F_B;7B3)OVERLAP_F_B", "not a pair of two ops"},
      {"(0F7;7B3)OVERLAP_F_B)OVERLAP_F_B", "goes on"},
      {"(0F7;7B99999999999)OVERLAP_F_B", "too large"},
      {")OVERLAP_F_B", "no stage"},
  };
  for (const auto& [text, reason] : cases) {
    SCOPED_TRACE(text);
    try {
      parse_step(text);
      ADD_FAILURE() << "was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(), HasSubstr(reason));
    }
  }
}

TEST(Step, LongGarbageIsQuotedInPart) {
  try {
    parse_step(std::string(100000, 'x'));
    FAIL() << "was accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_LT(std::string(error.what()).size(), 300u);
    EXPECT_THAT(error.what(), HasSubstr("xxx...\""));
  }
}

}  // namespace
}  // namespace dualpipe
