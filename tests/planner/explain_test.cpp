#include "dualpipe/planner/explain.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::planner {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

/// "F0" of a forward in the stream whose first stage is nearer; pairs as "F0&B1".
std::string brief(const Schedule& schedule, int rank, const Step& step) {
  const bool is_v = schedule.num_stages != static_cast<int>(schedule.ranks.size());
  const auto op_text = [&](const Op& op) {
    const bool far =
        is_v ? op.stage != rank : (op.micro_batch < schedule.num_micro_batches / 2) != (2 * rank < schedule.num_stages);
    return std::string(1, static_cast<char>(op.pass)) + (far ? "1" : "0");
  };
  return op_text(step.op) + (step.overlapped ? "&" + op_text(*step.overlapped) : "");
}

// The steps by what they are made of, as the report's text and the reference describe them.
TEST(EightSteps, AreWhatTheirDescriptionSays) {
  for (const std::string kind : {"dualpipe", "dualpipev"})
    for (const int ranks : {2, 4, 6, 8, 12})
      for (const int micro_batches : {2 * ranks, 2 * ranks + 2, 5 * ranks}) {
        const Schedule schedule = make_schedule({kind, ranks, micro_batches});
        const auto steps = eight_steps(schedule);
        ASSERT_EQ(steps.size(), schedule.ranks.size());
        for (int rank = 0; rank < ranks; ++rank) {
          SCOPED_TRACE(detail::str(kind, " ", ranks, " x ", micro_batches, " rank ", rank));
          int next = 0, last_number = 0;
          for (const Section& section : steps[rank]) {
            EXPECT_EQ(section.begin, next);
            EXPECT_GT(section.number, last_number);
            next = section.end;
            last_number = section.number;
            for (int i = section.begin; i < section.end; ++i) {
              const std::string op = brief(schedule, rank, schedule.ranks[rank][i]);
              const int at = i - section.begin;
              switch (section.number) {
                case 1:
                  EXPECT_EQ(op, "F0");
                  break;
                case 2:
                  EXPECT_EQ(op, at % 2 ? "F1" : "F0");
                  break;
                case 3:
                  EXPECT_EQ(op, at % 3 == 0 ? "I1" : at % 3 == 1 ? "W1" : "F1");
                  break;
                case 4:
                  if ((section.end - section.begin) % 2 == 1 && at < 2)
                    EXPECT_EQ(op, at == 0 ? "F0" : "B1");  // the rank where the schedule turns
                  else
                    EXPECT_EQ(op, (at + section.end - section.begin) % 2 ? "F1&B0" : "F0&B1");
                  break;
                case 5:
                  EXPECT_EQ(op, at % 2 ? "F1&B0" : "B1");
                  break;
                case 6:
                  EXPECT_EQ(op, std::string(2 * at < section.end - section.begin ? "B" : "I") + (at % 2 ? "0" : "1"));
                  break;
                case 7:
                  EXPECT_EQ(at % 2 ? op : op.substr(0, 1), at % 2 ? "I0" : "W");
                  break;
                default:
                  EXPECT_EQ(section.number, 8);
                  EXPECT_THAT(op, testing::StartsWith("W"));
              }
            }
          }
          EXPECT_EQ(next, static_cast<int>(schedule.ranks[rank].size()));
          EXPECT_EQ(last_number, 8);
          if (HasFailure()) return;
        }
      }
}

TEST(EightSteps, ReadFromAFileTheyAreTheSame) {
  const Schedule schedule = make_schedule({"dualpipe", 4, 8});
  EXPECT_EQ(eight_steps(from_csv(to_csv(schedule))), eight_steps(schedule));
  // What was changed is not explained as what it is not; nor are other kinds.
  Schedule changed = schedule;
  std::swap(changed.ranks[0][0], changed.ranks[0][1]);
  EXPECT_THAT([&] { eight_steps(changed); }, ThrowsMessage<InvalidArgument>(HasSubstr("'dualpipe' is neither")));
  for (const std::string kind : {"1f1b", "zbv", "gpipe"})
    EXPECT_THAT([&] { step_notes(make_schedule({kind, 4, 8})); }, ThrowsMessage<InvalidArgument>(HasSubstr(kind)));
}

TEST(EightSteps, MarksLieWhereTheStepsRun) {
  const Schedule schedule = make_schedule({"dualpipe", 8, 20});
  const Timeline timeline = simulate(schedule).timeline;
  const std::vector<Mark> marks = step_marks(schedule, timeline);
  ASSERT_EQ(marks.size(), 6U * 8 + 2 * 4);  // the two inner ranks have only four of them
  // Rank 0: six forwards, one of each, three times I W F, six pairs, …
  const double ends[] = {6, 8, 17, 35, 53, 56, 62, 63};
  double begin = 0;
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(marks[i].rank, 0);
    EXPECT_EQ(marks[i].text, std::to_string(i + 1));
    EXPECT_EQ(marks[i].window.begin, begin);
    EXPECT_EQ(marks[i].window.end, ends[i]);
    begin = ends[i];
  }
  EXPECT_THAT([&] { step_marks(schedule, {}); }, ThrowsMessage<InvalidArgument>(HasSubstr("lacks 0F0 of rank 0")));
}

TEST(EightSteps, NotesSayHowOften) {
  const std::vector<std::string> notes = step_notes(make_schedule({"dualpipe", 8, 20}));
  ASSERT_EQ(notes.size(), 9U);
  EXPECT_THAT(notes[1], testing::StartsWith("1  F0          x 6 to 0 "));
  EXPECT_THAT(notes[4], testing::StartsWith("4  F0&B1 F1&B0 x 3 to 6 "));
  EXPECT_THAT(step_notes(make_schedule({"dualpipev", 4, 9}))[0], HasSubstr("chunk"));
}

double worst_bubble(const std::string& kind, int ranks, int micro_batches, const Costs& costs, Publish publish) {
  double worst = 0;
  const Schedule schedule = make_schedule({kind, ranks, micro_batches});
  for (const RankReport& rank : report(simulate(schedule, costs, publish).timeline).ranks)
    worst = std::max(worst, rank.bubble);
  return worst;
}

// docs/schedule.md: where the published formulas are exact.
TEST(Bubble, PublishedFormulasHoldWhereTheDocumentSays) {
  const unsigned seed = 2024;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto between = [&](double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random);
  };
  for (int trial = 0; trial < 60; ++trial) {
    const int ranks = 2 * (1 + static_cast<int>(random() % 6)),
              micro_batches = ranks * (2 + 2 * static_cast<int>(random() % 3));
    const double forward = between(0.3, 2);
    SCOPED_TRACE(detail::str(ranks, " ranks, ", micro_batches, " micro-batches, trial ", trial));
    {  // any costs
      const double weight = between(0.1, 2), backward = weight + between(0.1, 2);
      const Costs costs{forward, backward, weight, forward + backward};
      for (const char* kind : {"1f1b", "gpipe"})
        EXPECT_NEAR(worst_bubble(kind, ranks, micro_batches, costs, Publish::atomic),
                    (ranks - 1) * (forward + backward), 1e-9);
    }
    {  // W <= F, W <= I
      const double input = between(0.3, 2), weight = between(0.05, std::min(forward, input)), backward = input + weight;
      EXPECT_NEAR(
          worst_bubble("zb1p", ranks, micro_batches, {forward, backward, weight, forward + backward}, Publish::atomic),
          (ranks - 1) * (forward + backward - 2 * weight), 1e-9);
    }
    {  // F = I, W <= F, B <= pair <= F + B
      const double weight = between(0.05, forward), backward = forward + weight;
      const double pair = between(backward, forward + backward);
      const Costs costs{forward, backward, weight, pair};
      const double turn = pair + backward - 3 * weight;
      EXPECT_NEAR(worst_bubble("dualpipe", ranks, micro_batches, costs, Publish::atomic), (ranks / 2 - 1) * turn, 1e-9);
      EXPECT_NEAR(worst_bubble("dualpipev", ranks / 2, micro_batches, costs, Publish::atomic), (ranks / 2 - 1) * turn,
                  1e-9);
    }
  }
}

TEST(Bubble, TheDocumentsTable) {
  struct Row {
    Costs costs;
    double atomic, early;
  };
  for (const Row& row : {Row{{1, 2, 1, 3}, 6, 3}, Row{{1, 1.5, 0.5, 2.5}, 7.5, 5.5}, Row{{1, 3, 1, 4}, 11, 8},
                         Row{{1, 3, 2, 4}, 6, 3}, Row{{1, 2, 1, 3.5}, 8.5, 5.5}}) {
    EXPECT_NEAR(worst_bubble("dualpipe", 8, 20, row.costs, Publish::atomic), row.atomic, 1e-9);
    EXPECT_NEAR(worst_bubble("dualpipe", 8, 20, row.costs, Publish::early), row.early, 1e-9);
  }
}

}  // namespace
}  // namespace dualpipe::planner
