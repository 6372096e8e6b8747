#include "dualpipe/planner/residency.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::planner {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(Residency, OfTwoRanksIsCountedByHand) {
  const Schedule schedule = make_schedule({"1f1b", 2, 1});
  const double d = 0.25;
  // Rank 1 posts the activation's receive at 0 and has it at 1 + d. Rank 0 posts the gradient's at 1; it is ready, behind
  // the F and the I of rank 1, at 3 + d.
  const Residency waits = residency(schedule, lower(schedule), {.send = d}, TransferStart::posted);
  EXPECT_DOUBLE_EQ(waits.makespan, 5 + 2 * d);
  EXPECT_DOUBLE_EQ(waits.ranks[0].resident, d + (2 + d));
  EXPECT_DOUBLE_EQ(waits.ranks[1].resident, (1 + d) + d);
  const Residency together = residency(schedule, lower(schedule), {.send = d}, TransferStart::both_ready);
  EXPECT_DOUBLE_EQ(together.makespan, waits.makespan);
  for (const Residency& each : {waits, together})
    for (const RankResidency& rank : each.ranks) EXPECT_DOUBLE_EQ(rank.moving, 2 * d);
  for (const RankResidency& rank : together.ranks) EXPECT_DOUBLE_EQ(rank.resident, 2 * d);
  EXPECT_DOUBLE_EQ(waits.most_resident(), (2 + 2 * d) / (5 + 2 * d));
}

TEST(Residency, OfTransfersThatStartTogetherIsTheirOwnTime) {
  for (const char* kind : {"dualpipe", "dualpipev", "1f1b", "interleaved", "zb1p", "zbv"})
    for (const Publish publish : {Publish::early, Publish::atomic}) {
      const Schedule schedule = make_schedule({kind, 8, 20});
      const Costs costs{.send = 0.02};
      const Program program = lower(schedule, publish);
      const Residency waits = residency(schedule, program, costs, TransferStart::posted, publish);
      const Residency together = residency(schedule, program, costs, TransferStart::both_ready, publish);
      std::vector<int> transfers(program.ranks.size(), 0);
      for (const Transfer& transfer : program.order) ++transfers[transfer.from], ++transfers[transfer.to];
      for (std::size_t rank = 0; rank < transfers.size(); ++rank) {
        EXPECT_NEAR(together.ranks[rank].resident, transfers[rank] * costs.send, 1e-9) << kind;
        EXPECT_GT(waits.ranks[rank].resident, together.ranks[rank].resident) << kind;
      }
      // One transfer after the other takes at least as long as all of them at once.
      EXPECT_GE(waits.makespan, simulate_makespan(schedule, costs, publish) - 1e-9) << kind;
      EXPECT_LT(together.most_resident(), 0.08) << kind;
      EXPECT_GT(waits.most_resident(), 0.3) << kind;
    }
}

TEST(Residency, WithoutTransferTimesTheStepIsAsSimulated) {
  for (const char* kind : {"dualpipe", "dualpipev", "1f1b", "zb1p", "zbv"}) {
    const Schedule schedule = make_schedule({kind, 4, 12});
    EXPECT_NEAR(residency(schedule, lower(schedule), {}, TransferStart::both_ready).makespan,
                simulate_makespan(schedule), 1e-9)
        << kind;
  }
}

TEST(Residency, ForwardOnlySchedulesHaveItToo) {
  const Schedule schedule = from_csv("0F0,0F1\n1F0,1F1\n");
  const Residency found = residency(schedule, lower(schedule), {.send = 0.5}, TransferStart::both_ready);
  EXPECT_DOUBLE_EQ(found.ranks[1].resident, 1);
}

TEST(Residency, RefusesProgramsThatDoNotRun) {
  const Schedule schedule = make_schedule({"1f1b", 2, 1});
  Program program = lower(schedule);
  std::erase_if(program.ranks[0], [](const Instruction& each) { return each.what == Instruction::Do::send; });
  EXPECT_THAT([&] { (void)residency(schedule, program, {}, TransferStart::posted); },
              ThrowsMessage<InvalidArgument>(HasSubstr("cannot run to its end")));
}

}  // namespace
}  // namespace dualpipe::planner
