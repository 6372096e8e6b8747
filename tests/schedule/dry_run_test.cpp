#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "programs.hpp"

namespace dualpipe {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;
using Do = Instruction::Do;

TEST(DryRun, CatchesEveryExchangeOfTwoTransfersOfARank) {
  constexpr unsigned seed = 3;
  std::mt19937 random(seed);
  for_each_schedule(6, [&](const Schedule& schedule) {
    const Program program = lower(schedule);
    for (int trial = 0; trial < 10; ++trial) {
      SCOPED_TRACE(detail::str("seed ", seed, " trial ", trial));
      const std::size_t rank = random() % program.ranks.size();
      std::vector<std::size_t> at;
      for (std::size_t i = 0; i < program.ranks[rank].size(); ++i)
        if (is_transfer(program.ranks[rank][i])) at.push_back(i);
      if (at.size() < 2) continue;
      const std::size_t one = random() % (at.size() - 1);
      const std::size_t other = trial % 2 == 0 ? one + 1 : one + 1 + random() % (at.size() - one - 1);
      Program mutant = program;
      std::swap(mutant.ranks[rank][at[one]], mutant.ranks[rank][at[other]]);
      EXPECT_THROW(dry_run(mutant), InvalidArgument);
    }
  });
}

TEST(DryRun, CatchesEveryLostOrRepeatedInstruction) {
  const Program program = lower(make_schedule({"dualpipe", 4, 6}));
  for (std::size_t rank = 0; rank < program.ranks.size(); ++rank)
    for (std::size_t i = 0; i < program.ranks[rank].size(); ++i) {
      const Instruction& instruction = program.ranks[rank][i];
      // Whether the weight gradients are complete is a question to the schedule, not to the program.
      if (instruction.what == Do::compute && instruction.step.op.pass == Pass::BackwardWeight) continue;
      Program lost = program, repeated = program;
      lost.ranks[rank].erase(lost.ranks[rank].begin() + static_cast<std::ptrdiff_t>(i));
      repeated.ranks[rank].insert(repeated.ranks[rank].begin() + static_cast<std::ptrdiff_t>(i), instruction);
      // Nothing needs the last backward of a micro-batch.
      if (instruction.what != Do::compute || instruction.step.op.pass == Pass::Forward ||
          instruction.step.op.stage > 0) {
        EXPECT_THROW(dry_run(lost), InvalidArgument) << rank << " " << i;
      }
      EXPECT_THROW(dry_run(repeated), InvalidArgument) << rank << " " << i;
    }
}

TEST(DryRun, NamesWhereEachRankIsStuck) {
  // Both ranks send first: each waits for the other to receive.
  Program program = lower(make_schedule({"dualpipe", 2, 2}));
  auto& rank1 = program.ranks[1];
  std::rotate(rank1.begin(), rank1.begin() + 1, rank1.begin() + 3);  // receive0 behind send1
  EXPECT_THAT([&] { dry_run(program); },
              ThrowsMessage<InvalidArgument>(testing::AllOf(
                  HasSubstr("rank 0 at instruction 1 of 13, send transfer 0, 0F0 from rank 0 to rank 1"),
                  HasSubstr("rank 1 at instruction 1 of 13, send transfer 1, 0F1 from rank 1 to rank 0"))));
}

TEST(DryRun, SaysWhatIsWrongWithAProgram) {
  const Program program = lower(make_schedule({"dualpipe", 2, 2}));
  const auto swapped = [&](int rank, int a, int b) {
    Program mutant = program;
    std::swap(mutant.ranks[rank][a], mutant.ranks[rank][b]);
    return [mutant] { dry_run(mutant); };
  };
  EXPECT_THAT(swapped(0, 0, 1), ThrowsMessage<InvalidArgument>(
                                    HasSubstr("send transfer 0, 0F0 from rank 0 to rank 1: not computed here before")));
  EXPECT_THAT(swapped(0, 4, 5),
              ThrowsMessage<InvalidArgument>(HasSubstr("compute 1F1: has not waited for transfer 1")));
  EXPECT_THAT(swapped(0, 5, 6),
              ThrowsMessage<InvalidArgument>(HasSubstr("compute 1B1: no forward on this rank before")));
  EXPECT_THAT(swapped(0, 2, 4),
              ThrowsMessage<InvalidArgument>(
                  HasSubstr("wait for transfer 1, 0F1 from rank 1 to rank 0: before this rank has received it")));
  EXPECT_THAT(swapped(0, 10, 11),
              ThrowsMessage<InvalidArgument>(HasSubstr("compute 0W0: no backward for the input on this rank before")));
  const auto with = [&](const Instruction& instruction) {
    Program mutant = program;
    mutant.ranks[0].insert(mutant.ranks[0].begin(), instruction);
    return [mutant] { dry_run(mutant); };
  };
  EXPECT_THAT(with({Do::send, 99, {}}), ThrowsMessage<InvalidArgument>(HasSubstr("transfer 99 of 4")));
  EXPECT_THAT(with({Do::send, 1, {}}), ThrowsMessage<InvalidArgument>(HasSubstr("this rank is not its sender")));
  Program doubled = program;
  doubled.order.push_back(doubled.order.front());
  EXPECT_THAT([&] { dry_run(doubled); }, ThrowsMessage<InvalidArgument>(HasSubstr("transfers 0 and 4 are the same")));
}

}  // namespace
}  // namespace dualpipe
