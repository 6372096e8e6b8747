// Contract: the end of a step.
#include <algorithm>
#include <atomic>

#include "comm/contract.hpp"

namespace dualpipe::contract {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST_P(Contract, ACommitGivesAllBallotsByRank) {
  run(4, [](Ptr world) {
    // Two groups of two ranks, which step beside each other, and split once more: disjoint groups with one number.
    const Ptr pair = world->split(world->rank() % 2, -world->rank());
    const Ptr alone = pair->split(pair->rank(), 0);
    for (int step = 1; step <= 5; ++step) {
      const auto ballot = [step](int rank) { return std::string(static_cast<std::size_t>(3 * rank), 'a' + step); };
      const int rank = world->rank();
      EXPECT_EQ(pair->commit(ballot(rank)), (std::vector{ballot(rank % 2 + 2), ballot(rank % 2)}));
      EXPECT_EQ(alone->commit(ballot(rank)), std::vector{ballot(rank)});
      if (step % 2 == 0) {
        EXPECT_EQ(world->commit(ballot(rank)), (std::vector{ballot(0), ballot(1), ballot(2), ballot(3)}));
      }
    }
    EXPECT_THROW(world->commit(std::string((1 << 20) + 1, 'x')), InvalidArgument);
    EXPECT_EQ(world->commit("").size(), 4u);
  });
}

/// A rank that fails at once in its next step reaches others while they still wait for votes.
TEST_P(Contract, AStepIsOverEverywhereOrNowhere) {
  for (int round = 0; round < 60 && !HasFailure(); ++round) {
    const int size = 2 + round % 3;
    std::vector<int> steps(static_cast<std::size_t>(size));
    run(size, [&](Ptr comm) {
      int& over = steps[static_cast<std::size_t>(comm->rank())];
      const CommError error = comm_error([&] {
        for (;; ++over) {
          if (comm->rank() == round % size && over == 1 + round % 5) comm->abort("fails in the next step");
          EXPECT_EQ(comm->commit(std::to_string(over)),
                    std::vector(static_cast<std::size_t>(size), std::to_string(over)));
        }
      });
      EXPECT_EQ(error.origin_rank(), round % size);
      EXPECT_THAT(error.what(), HasSubstr("fails in the next step"));
      EXPECT_EQ(comm_error([&] { comm->commit(""); }).origin_rank(), round % size);
    });
    EXPECT_THAT(steps, ::testing::Each(1 + round % 5)) << "round " << round;
  }
}

TEST_P(Contract, ACommitEndsWhenARankHasLeft) {
  std::vector<int> steps(3);
  run(3, [&](Ptr comm) {
    const int rank = comm->rank();
    for (; steps[rank] < 4; ++steps[rank]) comm->commit("");
    if (rank == 1) return;
    const CommError error = comm_error([&] { comm->commit(""); });
    EXPECT_EQ(error.origin_rank(), 1);
    EXPECT_THAT(error.what(), AllOf(HasSubstr("commit"), HasSubstr("rank 1 has left")));
  });
  EXPECT_THAT(steps, ::testing::Each(4));
}

}  // namespace
}  // namespace dualpipe::contract
