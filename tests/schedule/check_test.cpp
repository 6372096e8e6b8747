#include "dualpipe/schedule/check.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "error_of.hpp"
#include "reference.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::Field;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

std::string error_of(const Schedule& schedule) {
  return test::error_of([&] { check(schedule); });
}

void expect_first(const std::string& csv, int rank, int cell, const std::string& message) {
  const auto found = violations(from_csv(csv));
  ASSERT_THAT(found, Not(IsEmpty())) << csv;
  EXPECT_EQ(found[0].rank, rank) << csv;
  EXPECT_EQ(found[0].cell, cell) << csv;
  EXPECT_THAT(found[0].message, HasSubstr(message)) << csv;
}

TEST(Check, AcceptsWhatNoGeneratorMakes) {
  for (const std::string csv : {
           "0F0,0B0",                                        // one rank, one stage
           "0F0,1F0,1B0,0B0,0F1,1F1,1B1,0B1",                // two stages on one rank
           "0F0,,0F1,,,0B0,0B1\n,1F0,1B0,,1F1,1B1,,",        // idle cells
           "0F0,0F1,0I0,0B1,0W0\n1F0,1F1,1I0,1I1,1W1,1W0",   // backward whole here and split there, W late and not in
                                                             // order
           "0F0,0F1,0B1,0B0\n1F1,1B1,1F0,1B0",               // micro-batches in any order
           "0F0,1F1,1B1,0B0\n1F0,1B0,0F1,0B1",               // placement by micro-batch
           "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1B1",  // a pair of one stage
           "0F0,0F1,(0F2;0I0)OVERLAP_F_B,0I1,0W0,0W1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2",  // a pair with I
           "0F0,0B0\n,,\n1F0,1B0",                                                   // a rank without work
       }) {
    EXPECT_EQ(error_of(from_csv(csv)), "no InvalidArgument") << csv;
    EXPECT_TRUE(reference::valid(from_csv(csv))) << csv;
  }
}

TEST(Check, NamesWhatIsMissing) {
  expect_first("0F0,0B0,0B1\n1F0,1B0,1F1,1B1", 0, 2, "0F1 is missing");
  expect_first("0F0,0F1,0B0\n1F0,1B0,1F1,1B1", 0, 1, "0B1 is missing (or 0I1 and 0W1)");
  expect_first("0F0,0F1,0B0,0I1\n1F0,1B0,1F1,1B1", 0, 3, "0W1 is missing, 0I1 is only half of a backward");
  expect_first("0F0,0F1,0B0,0W1\n1F0,1B0,1F1,1B1", 0, 3, "0I1 is missing, 0W1 needs it");
  expect_first("0F0,0B0\n1F0,1B0,1F1,1B1", -1, -1, "0F1 is missing");
  expect_first("0F0,0B0\n2F1,2B1", -1, -1,
               "3 stages and 2 micro-batches need 6 forwards and as many backwards, the schedule has 4 ops; the first "
               "that is missing is 0F1");
}

TEST(Check, NamesWhatIsThereTwice) {
  expect_first("0F0,0F0,0B0", 0, 1, "0F0 is done twice, before in cell 1 of rank 0");
  expect_first("0F0,0B0\n0F0,0B0", 1, 0, "0F0 is done twice, before in cell 1 of rank 0");
  expect_first("0F0,0B0,0I0,0W0", 0, 2, "0I0 is part of 0B0, which is done in cell 2 of rank 0");
  expect_first("0F0,0B0,0W0,0F1,0I1,0W1", 0, 2, "0W0 is part of 0B0");
}

TEST(Check, WantsOneRankForAStageAndMicroBatch) {
  expect_first("0F0\n0B0", 1, 0,
               "0B0 is on another rank than the rest of stage 0 of micro-batch 0, which is in cell 1 of rank 0");
  expect_first("0F0,0I0,1F0\n1B0,0W0", 1, 1, "0W0 is on another rank");
}

TEST(Check, WantsForwardThenBackwardThenWeight) {
  expect_first("0B0,0F0", 0, 0, "0B0 comes before 0F0, which it needs and which is in cell 2 of rank 0");
  expect_first("0F0,0W0,0I0", 0, 1, "0W0 comes before 0I0");
  expect_first("(0F0;0B0)OVERLAP_F_B", 0, 0, "0B0 is paired with 0F0, which it needs");
}

TEST(Check, WantsPairsOfForwardAndBackward) {
  expect_first("0F0,(0B0;0F1)OVERLAP_F_B,0B1", 0, 1, "(0B0;0F1)OVERLAP_F_B is no pair of a forward and a backward");
  expect_first("(0F0;0F1)OVERLAP_F_B,0B0,0B1", 0, 0, "no pair");
  expect_first("0F0,0I0,(0F1;0W0)OVERLAP_F_B,0B1", 0, 2, "no pair");
}

TEST(Check, SpellsADeadlockOut) {
  // Rank 1 wants to go back with micro-batch 0 before rank 2 may, rank 2 wants another forward first.
  const std::string csv = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n2F0,2F1,2B0,2B1\n";
  expect_first(csv, 1, 1,
               "deadlock: rank 1 waits at cell 2 (1B0) for 2B0, cell 3 of rank 2, which waits at cell 2 (2F1) for 1F1, "
               "cell 3 of rank 1; "
               "1 other rank waits behind them");
  // A rank that waits for its own later op, at the turn of a V.
  expect_first("0F0,1F1,0F1,1F0,1B0,1B1,0B0,0B1", 0, 1, "rank 0 waits at cell 2 (1F1) for 0F1, its own cell 3");
  // A pair waits for both of its inputs.
  expect_first("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1F1,1B0,1B1", 0, 1,
               "rank 0 waits at cell 2 ((0F1;0B0)OVERLAP_F_B) for 1B0, cell 3 of rank 1");
}

TEST(Check, ALongCycleIsCut) {
  // Each stage wants the second micro-batch before the first, the one before it the reverse.
  Schedule schedule{.name = "ring", .num_stages = 40, .num_micro_batches = 40, .ranks = {}};
  schedule.ranks.resize(40);
  for (int r = 0; r < 40; ++r) {
    auto& steps = schedule.ranks[static_cast<std::size_t>(r)];
    // Stage s of micro-batch m on rank (s + m) % 40; every rank begins at its last stage.
    for (int s = 39; s >= 0; --s) steps.push_back({{Pass::Forward, s, (r - s + 40) % 40}, std::nullopt});
    for (int s = 39; s >= 0; --s) steps.push_back({{Pass::Backward, s, (r - s + 40) % 40}, std::nullopt});
  }
  const auto found = violations(schedule);
  ASSERT_THAT(found, SizeIs(1));
  EXPECT_THAT(found[0].message, HasSubstr(", and so on through 40 ranks"));
  EXPECT_LT(found[0].message.size(), 2000u);
}

TEST(Check, CountsMustMatchTheOps) {
  Schedule schedule = make_schedule({.kind = "1f1b", .num_ranks = 2, .num_micro_batches = 3});
  schedule.num_micro_batches = 2;
  EXPECT_THAT(error_of(schedule), HasSubstr("0F2 lies outside of 2 stages and 2 micro-batches"));
  schedule.num_micro_batches = 4;
  EXPECT_THAT(error_of(schedule), HasSubstr("0F3 is missing"));
  schedule.num_micro_batches = 2147483647;
  schedule.num_stages = 2147483647;
  EXPECT_THAT(error_of(schedule), HasSubstr("missing"));
  schedule.num_stages = 0;
  EXPECT_THAT(error_of(schedule), HasSubstr("at least one stage and one micro-batch"));
  schedule.num_stages = -1;
  EXPECT_THAT(error_of(schedule), HasSubstr("at least one stage"));
  EXPECT_THAT(error_of(Schedule{}), HasSubstr("at least one stage"));

  schedule = make_schedule({.kind = "1f1b", .num_ranks = 2, .num_micro_batches = 3});
  schedule.ranks[1][0].op.stage = -1;
  EXPECT_THAT(error_of(schedule), HasSubstr("-1F0 lies outside"));
  schedule.ranks[1][0].op = {static_cast<Pass>(0), 1, 0};
  EXPECT_THAT(error_of(schedule), HasSubstr("none of F, I, W, B"));
}

TEST(Check, ShowsTheGridAroundTheFirstFinding) {
  EXPECT_EQ(error_of(from_csv("0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1F1,1B0,1B1,1F2,1B2\n2F0,2B0,2B1,2F1,2F2,2B2\n", "hand")),
            "schedule \"hand\" cannot run: rank 2, cell 3: 2B1 comes before 2F1, which it needs and which is in cell 4 "
            "of rank 2\n"
            "       1      2      3      4      5\n"
            "rank 0  0F0    0F1    0B0    0F2    0B1\n"
            "rank 1  1F0    1F1    1B0    1B1    1F2\n"
            "rank 2  2F0    2B0   [2B1]   2F1    2F2   <-- here\n");
}

TEST(CellsAround, StaysWithinTheGrid) {
  const Schedule schedule = from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1B1\n");
  EXPECT_EQ(cells_around(schedule, 0, 1, 1),
            "          1         2         3\n"
            "rank 0     0F0      [0F1&0B0]  0B1      <-- here\n"
            "rank 1     1F0       1B0       1F1\n");
  EXPECT_THAT(cells_around(schedule, 1, 3, 0), AllOf(HasSubstr("[1B1]"), HasSubstr("<-- here"), Not(HasSubstr("1F1"))));
  EXPECT_THAT(cells_around(schedule, 1, -1, 5), AllOf(HasSubstr("1F1"), HasSubstr("<-- here"), Not(HasSubstr("["))));
  EXPECT_THAT(cells_around(schedule, 1, 99, 1), AllOf(HasSubstr("1B1"), HasSubstr("<-- here"), Not(HasSubstr("["))));
  EXPECT_THAT(cells_around(schedule, 1, 1, 2147483647), HasSubstr("[1B0]"));
  EXPECT_EQ(cells_around(schedule, 2, 0, 1), "");
  EXPECT_EQ(cells_around(schedule, -1, -1, 1), "");
}

TEST(Check, ManyFindingsAreCounted) {
  Schedule schedule = make_schedule({.kind = "gpipe", .num_ranks = 2, .num_micro_batches = 1000});
  std::reverse(schedule.ranks[1].begin(), schedule.ranks[1].end());
  const auto found = violations(schedule);
  ASSERT_GT(found.size(), 2u);
  EXPECT_LT(found.size(), 20u);
  EXPECT_THAT(found, Each(Field(&Violation::rank, 1)));
  EXPECT_EQ(found.back().message, detail::str("and ", 1000 - (found.size() - 1), " more on this rank"));
  EXPECT_THAT(error_of(schedule), HasSubstr(detail::str("(and ", found.size() - 1, " more findings)")));
}

// A random valid schedule: any placement, any order, whole and split backwards, pairs where both inputs are there.
Schedule random_schedule(std::mt19937& random) {
  const auto below = [&](int n) { return std::uniform_int_distribution<int>(0, n - 1)(random); };
  const int ranks = 1 + below(4);
  Schedule schedule{.name = "random", .num_stages = 1 + below(5), .num_micro_batches = 1 + below(5), .ranks = {}};
  schedule.ranks.resize(static_cast<std::size_t>(ranks));
  const int last = schedule.num_stages - 1;
  struct Item {
    int rank;
    Op op;
  };
  std::vector<Item> ready;
  std::vector<std::vector<int>> rank_of(static_cast<std::size_t>(schedule.num_stages));
  for (auto& row : rank_of)
    for (int m = 0; m < schedule.num_micro_batches; ++m) row.push_back(below(ranks));
  const auto offer = [&](Pass pass, int s, int m) {
    ready.push_back({rank_of[static_cast<std::size_t>(s)][static_cast<std::size_t>(m)], {pass, s, m}});
  };
  const auto take = [&](std::size_t i) {
    const Item item = ready[i];
    ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(i));
    return item;
  };
  const auto follow = [&](const Op& op) {
    const auto backward = [&](int s) {
      offer(below(2) == 0 ? Pass::Backward : Pass::BackwardInput, s, op.micro_batch);
    };
    if (op.pass == Pass::Forward && op.stage < last) offer(Pass::Forward, op.stage + 1, op.micro_batch);
    if (op.pass == Pass::Forward && op.stage == last) backward(last);
    if (op.pass == Pass::BackwardInput) offer(Pass::BackwardWeight, op.stage, op.micro_batch);
    if ((op.pass == Pass::Backward || op.pass == Pass::BackwardInput) && op.stage > 0) backward(op.stage - 1);
  };
  for (int m = 0; m < schedule.num_micro_batches; ++m) offer(Pass::Forward, 0, m);
  while (!ready.empty()) {
    const Item item = take(static_cast<std::size_t>(below(static_cast<int>(ready.size()))));
    Step step{item.op, std::nullopt};
    if (item.op.pass == Pass::Forward && below(2) == 0) {
      const auto partner = std::find_if(ready.begin(), ready.end(), [&](const Item& other) {
        return other.rank == item.rank && (other.op.pass == Pass::Backward || other.op.pass == Pass::BackwardInput);
      });
      if (partner != ready.end()) step.overlapped = take(static_cast<std::size_t>(partner - ready.begin())).op;
    }
    schedule.ranks[static_cast<std::size_t>(item.rank)].push_back(step);
    for (const Op& op : reference::ops_of(step)) follow(op);
  }
  return schedule;
}

TEST(Check, AcceptsRandomValidSchedules) {
  constexpr unsigned seed = 20241226;
  std::mt19937 random(seed);
  for (int trial = 0; trial < 2000; ++trial) {
    const Schedule schedule = random_schedule(random);
    ASSERT_TRUE(reference::valid(schedule)) << "seed " << seed << ", trial " << trial << "\n" << to_csv(schedule);
    ASSERT_THAT(violations(schedule), IsEmpty()) << "seed " << seed << ", trial " << trial << "\n" << to_csv(schedule);
    Schedule read = from_csv(to_csv(schedule), schedule.name);
    ASSERT_EQ(read, schedule);
  }
}

// One change that may or may not leave a valid schedule.
class Mutation {
 public:
  explicit Mutation(std::mt19937& random) : random_(random) {}

  std::string apply(Schedule& schedule) {
    const std::size_t rank = below(schedule.ranks.size());
    auto& steps = schedule.ranks[rank];
    if (steps.empty()) return "none";
    const std::size_t cell = below(steps.size());
    Step& step = steps[cell];
    Op& op = step.overlapped && below(2) == 0 ? *step.overlapped : step.op;
    switch (below(11)) {
      case 0:
        std::swap(step, steps[below(steps.size())]);
        return "swap";
      case 1:
        std::swap(step, steps[std::min(cell + 1, steps.size() - 1)]);
        return "swap neighbours";
      case 2:
        steps.erase(steps.begin() + static_cast<std::ptrdiff_t>(cell));
        return "drop";
      case 3:
        insert(steps, step);
        return "duplicate";
      case 4: {
        const Step moved = step;
        steps.erase(steps.begin() + static_cast<std::ptrdiff_t>(cell));
        insert(schedule.ranks[below(schedule.ranks.size())], moved);
        return "move";
      }
      case 5:
        op.micro_batch = static_cast<int>(below(static_cast<std::size_t>(schedule.num_micro_batches) + 1));
        return "change micro-batch";
      case 6:
        op.stage = static_cast<int>(below(static_cast<std::size_t>(schedule.num_stages) + 1));
        return "change stage";
      case 7: {
        constexpr Pass passes[] = {Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight, Pass::Backward};
        op.pass = passes[below(4)];
        return "change pass";
      }
      case 8: {
        if (!step.overlapped) return "none";
        const Step second{*step.overlapped, std::nullopt};
        step.overlapped.reset();
        insert(steps, second);
        return "pull a pair apart";
      }
      case 9: {
        if (cell + 1 >= steps.size() || step.overlapped || steps[cell + 1].overlapped) return "none";
        step.overlapped = steps[cell + 1].op;
        steps.erase(steps.begin() + static_cast<std::ptrdiff_t>(cell) + 1);
        return "pair up";
      }
      default: {
        if (op.pass != Pass::Backward) return "none";
        op.pass = Pass::BackwardInput;
        insert(steps, {{Pass::BackwardWeight, op.stage, op.micro_batch}, std::nullopt});
        return "split a backward";
      }
    }
  }

 private:
  std::size_t below(std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_); }
  void insert(std::vector<Step>& steps, Step step) {
    steps.insert(steps.begin() + static_cast<std::ptrdiff_t>(below(steps.size() + 1)), step);
  }

  std::mt19937& random_;
};

class Mutated : public testing::TestWithParam<std::string> {};

TEST_P(Mutated, IsRefusedExactlyWhenItCannotRun) {
  constexpr unsigned seed = 19;
  std::mt19937 random(seed);
  Mutation mutation(random);
  int accepted = 0;
  int refused = 0;
  std::set<std::string> kinds_of_change;
  for (const auto& [P, N] : {std::pair{2, 2}, {2, 4}, {2, 5}, {3, 5}, {3, 6}, {4, 8}}) {
    if (GetParam() == "dualpipe" && (P % 2 != 0 || N % 2 != 0)) continue;
    if (GetParam() == "dualpipev" && N < 2 * P - 1) continue;
    const Schedule original = make_schedule({.kind = GetParam(), .num_ranks = P, .num_micro_batches = N});
    for (int trial = 0; trial < 400; ++trial) {
      Schedule schedule = original;
      std::string changes;
      for (int i = 0; i <= trial % 3; ++i) {
        const std::string change = mutation.apply(schedule);
        kinds_of_change.insert(change);
        changes += change + "; ";
      }
      const bool valid = reference::valid(schedule);
      ++(valid ? accepted : refused);
      ASSERT_EQ(violations(schedule).empty(), valid)
          << "seed " << seed << ", " << P << " x " << N << ", trial " << trial << ": " << changes << "\n"
          << to_csv(schedule);
      ASSERT_EQ(error_of(schedule) == "no InvalidArgument", valid);
    }
  }
  EXPECT_GT(accepted, 50);
  EXPECT_GT(refused, 400);
  EXPECT_GE(kinds_of_change.size(), 10u);
}

INSTANTIATE_TEST_SUITE_P(All, Mutated, testing::ValuesIn(schedule_kinds()),
                         [](const auto& kind) { return kind.param; });

}  // namespace
}  // namespace dualpipe
