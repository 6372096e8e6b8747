#include "dualpipe/schedule/generate.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "error_of.hpp"
#include "reference.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string golden(const std::string& file) {
  std::ifstream in(std::string(DUALPIPE_GOLDENS) + "/" + file, std::ios::binary);
  EXPECT_TRUE(in.good()) << file;
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string spec_error(const ScheduleSpec& spec) {
  return test::error_of([&] { make_schedule(spec); });
}

Schedule make(const std::string& kind, int ranks, int micro_batches, int chunks = 2) {
  return make_schedule(
      {.kind = kind, .num_ranks = ranks, .num_micro_batches = micro_batches, .chunks_per_rank = chunks});
}

int fewest_micro_batches(const std::string& kind, int ranks) {
  if (kind == "dualpipe") return 2 * ranks - 2;
  if (kind == "dualpipev") return 2 * ranks - 1;
  return 1;
}

bool takes(const std::string& kind, int ranks, int micro_batches) {
  if (micro_batches < fewest_micro_batches(kind, ranks)) return false;
  return kind != "dualpipe" || (ranks % 2 == 0 && micro_batches % 2 == 0);
}

// The example of the DeepSeek-V3 report: 8 ranks, 20 micro-batches.
TEST(Golden, DualPipe8x20) { EXPECT_EQ(to_csv(make("dualpipe", 8, 20)), golden("dualpipe_8x20.csv")); }

TEST(Golden, DualPipeV8x20) { EXPECT_EQ(to_csv(make("dualpipev", 8, 20)), golden("dualpipev_8x20.csv")); }

TEST(Golden, IsReadBack) {
  EXPECT_EQ(from_csv(golden("dualpipe_8x20.csv"), "dualpipe"), make("dualpipe", 8, 20));
  EXPECT_EQ(from_csv(golden("dualpipev_8x20.csv"), "dualpipev"), make("dualpipev", 8, 20));
}

// A row of the report's figure, by digits as DESIGN's steps count them: "F0" is a forward of the near direction,
// "F1&B0" a pair; each digit counts its own micro-batches.
std::vector<std::string> by_digits(const Schedule& schedule, int rank, int near_stage) {
  std::vector<std::string> row;
  for (const Step& step : schedule.ranks[static_cast<std::size_t>(rank)]) {
    std::string text;
    for (const Op& op : reference::ops_of(step))
      text += std::string(text.empty() ? "" : "&") + static_cast<char>(op.pass) + (op.stage == near_stage ? "0" : "1");
    row.push_back(text);
  }
  return row;
}

std::vector<std::string> repeated(std::vector<std::pair<int, std::vector<std::string>>> parts) {
  std::vector<std::string> row;
  for (const auto& [times, part] : parts)
    for (int i = 0; i < times; ++i) row.insert(row.end(), part.begin(), part.end());
  return row;
}

TEST(DualPipe, FirstRankOfTheFigure) {
  // Step 6 has two ops here, B1 and then I0.
  const auto expected = repeated({{6, {"F0"}},
                                  {1, {"F0", "F1"}},
                                  {3, {"I1", "W1", "F1"}},
                                  {3, {"F0&B1", "F1&B0"}},
                                  {3, {"B1", "F1&B0"}},
                                  {1, {"B1", "I0"}},
                                  {3, {"W0", "I0"}},
                                  {1, {"W0"}}});
  EXPECT_EQ(by_digits(make("dualpipe", 8, 20), 0, 0), expected);
  EXPECT_EQ(by_digits(make("dualpipe", 8, 20), 7, 0), expected);
}

TEST(DualPipe, MiddleRankOfTheFigure) {
  const auto expected = repeated({{4, {"F0", "F1"}},
                                  {1, {"F0", "B1", "F1&B0"}},  // the first pair of step 4, pulled apart
                                  {5, {"F0&B1", "F1&B0"}},
                                  {2, {"B1", "B0"}},
                                  {2, {"I1", "I0"}},
                                  {2, {"W1", "W0"}}});
  EXPECT_EQ(by_digits(make("dualpipe", 8, 20), 3, 3), expected);
  EXPECT_EQ(by_digits(make("dualpipe", 8, 20), 4, 3), expected);
}

TEST(DualPipeV, LastRankPullsTheFirstPairApart) {
  const auto row = by_digits(make("dualpipev", 8, 20), 7, 7);
  const auto expected = repeated({{8, {"F0", "F1"}},
                                  {1, {"F0", "B1", "F1&B0"}},
                                  {11, {"F0&B1", "F1&B0"}},
                                  {4, {"B1", "B0"}},
                                  {4, {"I1", "I0"}},
                                  {4, {"W1", "W0"}}});
  EXPECT_EQ(row, expected);
}

// The two directions of DualPipe are each other's mirror image.
TEST(DualPipe, IsSymmetric) {
  for (const auto& [P, N] : {std::pair{2, 2}, {4, 8}, {8, 20}, {16, 64}}) {
    Schedule schedule = make("dualpipe", P, N);
    Schedule mirrored = schedule;
    std::reverse(mirrored.ranks.begin(), mirrored.ranks.end());
    const auto mirror = [half = N / 2](Op& op) { op.micro_batch += op.micro_batch < half ? half : -half; };
    for (auto& steps : mirrored.ranks) {
      for (Step& step : steps) {
        mirror(step.op);
        if (step.overlapped) mirror(*step.overlapped);
      }
    }
    EXPECT_EQ(mirrored, schedule) << P << " x " << N;
  }
}

TEST(DualPipe, PlacesTheDirections) {
  const Schedule schedule = make("dualpipe", 8, 20);
  const Schedule folded = make("dualpipev", 8, 20);
  for (int s = 0; s < 8; ++s) {
    EXPECT_EQ(rank_of(schedule, s, 0), s);
    EXPECT_EQ(rank_of(schedule, s, 9), s);
    EXPECT_EQ(rank_of(schedule, s, 10), 7 - s);
    EXPECT_EQ(rank_of(schedule, s, 19), 7 - s);
    EXPECT_EQ(rank_of(folded, s, 0), s);
    EXPECT_EQ(rank_of(folded, 15 - s, 19), s);
  }
}

struct Size {
  int ranks;
  int micro_batches;
};

class Kind : public testing::TestWithParam<std::string> {
 protected:
  // Ranks 1 to 16, and around each bound that some kind has, many micro-batches.
  static std::vector<Size> sizes() {
    std::vector<Size> all;
    for (int P = 1; P <= 16; ++P)
      for (const int N :
           {1, 2, 3, P - 1, P, P + 1, 2 * P - 3, 2 * P - 2, 2 * P - 1, 2 * P, 2 * P + 1, 3 * P, 4 * P, 4 * P + 2, 37})
        if (N >= 1) all.push_back({P, N});
    return all;
  }
};

TEST_P(Kind, IsValidWhereItIsTakenAndRefusedElsewhere) {
  for (const auto& [P, N] : sizes()) {
    SCOPED_TRACE(detail::str(GetParam(), " ", P, " x ", N));
    if (!takes(GetParam(), P, N)) {
      EXPECT_NE(spec_error({.kind = GetParam(), .num_ranks = P, .num_micro_batches = N}), "no InvalidArgument");
      continue;
    }
    const Schedule schedule = make(GetParam(), P, N);
    EXPECT_EQ(schedule.name, GetParam());
    EXPECT_EQ(schedule.ranks.size(), static_cast<std::size_t>(P));
    EXPECT_EQ(schedule.num_micro_batches, N);
    EXPECT_THAT(violations(schedule), IsEmpty());
    EXPECT_TRUE(reference::valid(schedule));
  }
}

// Every rank does the same share: the forwards of its stages, N for each (DualPipe: N/2 for each of two).
TEST_P(Kind, SharesTheWorkEqually) {
  const bool folded = GetParam() == "dualpipev" || GetParam() == "zbv" || GetParam() == "interleaved";
  for (const auto& [P, N] : {Size{2, 4}, {4, 8}, {8, 20}}) {
    const Schedule schedule = make(GetParam(), P, N);
    EXPECT_EQ(schedule.num_stages, folded ? 2 * P : P);
    for (const auto& steps : schedule.ranks) {
      std::map<Pass, int> count;
      for (const Step& step : steps)
        for (const Op& op : reference::ops_of(step)) ++count[op.pass];
      EXPECT_EQ(count[Pass::Forward], folded ? 2 * N : N);
      EXPECT_EQ(count[Pass::Backward] + count[Pass::BackwardInput], count[Pass::Forward]);
      EXPECT_EQ(count[Pass::BackwardWeight], count[Pass::BackwardInput]);
    }
  }
}

TEST_P(Kind, RefusesNumbersBelowOne) {
  EXPECT_THAT(spec_error({.kind = GetParam(), .num_ranks = 0, .num_micro_batches = 4}),
              HasSubstr("ranks must be at least 1, got 0"));
  EXPECT_THAT(spec_error({.kind = GetParam(), .num_ranks = -2, .num_micro_batches = 4}), HasSubstr("got -2"));
  EXPECT_THAT(spec_error({.kind = GetParam(), .num_ranks = 2, .num_micro_batches = 0}),
              HasSubstr("micro-batches must be at least 1, got 0"));
  EXPECT_THAT(spec_error({.kind = GetParam(), .num_ranks = 2, .num_micro_batches = -6}), HasSubstr("got -6"));
}

TEST_P(Kind, RefusesWhatWouldFillTheMemory) {
  for (const auto& [P, N] : {Size{2147483646, 2147483646}, {2, 2147483646}, {2147483646, 2}, {1 << 20, 1 << 21}})
    EXPECT_THAT(spec_error({.kind = GetParam(), .num_ranks = P, .num_micro_batches = N}),
                HasSubstr("the most supported"))
        << P << " x " << N;
}

INSTANTIATE_TEST_SUITE_P(All, Kind, testing::ValuesIn(schedule_kinds()), [](const auto& kind) { return kind.param; });

TEST(Peaks, AreWhatEachKindPromisesWhateverTheNumberOfMicroBatches) {
  for (int P = 1; P <= 16; ++P) {
    for (const int N : {2 * P, 2 * P + 2, 4 * P, 64}) {
      SCOPED_TRACE(detail::str(P, " x ", N));
      if (P % 2 == 0) {
        const auto peaks = reference::peaks(make("dualpipe", P, N));
        EXPECT_EQ(peaks.activations, P + 1);
        EXPECT_LE(peaks.queued_weights, P / 2);
      }
      const auto folded = reference::peaks(make("dualpipev", P, N));
      EXPECT_EQ(folded.activations, 2 * P + 1);
      EXPECT_LE(folded.queued_weights, P);
      EXPECT_EQ(reference::peaks(make("1f1b", P, N)).activations, P);
      EXPECT_EQ(reference::peaks(make("zb1p", P, N)).activations, P);
      EXPECT_LE(reference::peaks(make("zb1p", P, N)).queued_weights, P);
      EXPECT_EQ(reference::peaks(make("zbv", P, N)).activations, 2 * P);
      EXPECT_LT(reference::peaks(make("zbv", P, N)).queued_weights, 2 * P);
      EXPECT_EQ(reference::peaks(make("gpipe", P, N)).activations, N);
    }
  }
}

TEST(Peaks, ZeroBubbleHoldsAsMuchAs1F1BWithItsWeightPartsCounted) {
  for (int P = 1; P <= 16; ++P) {
    for (const auto& steps : make("zb1p", P, 3 * P).ranks) {
      int held = 0;
      int most = 0;
      for (const Step& step : steps) {
        held += step.op.pass == Pass::Forward ? 1 : step.op.pass == Pass::BackwardWeight ? -1 : 0;
        most = std::max(most, held);
      }
      EXPECT_EQ(most, P);
    }
  }
}

// The bubbles that were published for these orders, at F = 1, B = 2, W = 1 and pairs of 3.
TEST(Makespan, IsThePublishedOne) {
  for (const int P : {2, 4, 8, 16}) {
    for (const int N : {2 * P, 3 * P, 6 * P}) {
      SCOPED_TRACE(detail::str(P, " x ", N));
      EXPECT_EQ(reference::makespan(make("1f1b", P, N)), 3 * (N + P - 1));
      EXPECT_EQ(reference::makespan(make("gpipe", P, N)), 3 * (N + P - 1));
      EXPECT_EQ(reference::makespan(make("zb1p", P, N)), 3 * N + P - 1);
      EXPECT_EQ(reference::makespan(make("zbv", P, N)), 6 * N + P - 1);
      EXPECT_EQ(reference::makespan(make("dualpipe", P, N)), 3 * N + (P / 2 - 1) * 2);
      for (const int chunks : {2, 3}) {
        const auto interleaved = reference::makespan(make("interleaved", P, N, chunks));
        EXPECT_EQ(interleaved, 3 * (chunks * N + P - 1)) << chunks << " chunks";
      }
    }
  }
  EXPECT_EQ(reference::makespan(make("dualpipe", 8, 20)), 66);
}

TEST(Interleaved, TakesAnyNumberOfMicroBatches) {
  for (int P = 1; P <= 6; ++P) {
    for (int N = 1; N <= 4 * P + 1; ++N) {
      for (const int chunks : {2, 3, 4}) {
        SCOPED_TRACE(detail::str(P, " x ", N, ", ", chunks, " chunks"));
        const Schedule schedule = make("interleaved", P, N, chunks);
        EXPECT_THAT(violations(schedule), IsEmpty());
        EXPECT_TRUE(reference::valid(schedule));
        EXPECT_EQ(schedule.num_stages, chunks * P);
        for (int s = 0; s < schedule.num_stages; ++s) EXPECT_EQ(rank_of(schedule, s, N - 1), s % P);
        // A remainder of micro-batches must not cost more than the groups it cannot fill.
        if (N < P) continue;
        EXPECT_LE(reference::makespan(schedule).value(), 3.0 * (chunks * N + P - 1) + 3.0 * (2 * P - 1));
      }
    }
  }
}

TEST(MakeSchedule, SaysWhatWouldWork) {
  EXPECT_THAT(spec_error({.kind = "dualpipe", .num_ranks = 3, .num_micro_batches = 12}),
              HasSubstr("DualPipe needs an even number of ranks, got 3; dualpipev takes odd numbers"));
  EXPECT_THAT(spec_error({.kind = "dualpipe", .num_ranks = 4, .num_micro_batches = 9}),
              AllOf(HasSubstr("even number of micro-batches"), HasSubstr("got 9"), HasSubstr("dualpipev")));
  EXPECT_THAT(spec_error({.kind = "dualpipe", .num_ranks = 8, .num_micro_batches = 12}),
              AllOf(HasSubstr("8 ranks needs at least 14"), HasSubstr("got 12"), HasSubstr("1f1b")));
  EXPECT_THAT(spec_error({.kind = "dualpipev", .num_ranks = 3, .num_micro_batches = 4}),
              AllOf(HasSubstr("3 ranks needs at least 5"), HasSubstr("got 4"), HasSubstr("zbv")));
  EXPECT_THAT(spec_error({.kind = "interleaved", .num_ranks = 2, .num_micro_batches = 4, .chunks_per_rank = 1}),
              AllOf(HasSubstr("at least 2 chunks per rank, got 1"), HasSubstr("1f1b")));
  EXPECT_THAT(
      spec_error({.kind = "interleaved", .num_ranks = 2, .num_micro_batches = 4, .chunks_per_rank = 2147483647}),
      HasSubstr("the most supported"));
  EXPECT_THAT(spec_error({.kind = "pipedream", .num_ranks = 2, .num_micro_batches = 4}),
              AllOf(HasSubstr("\"pipedream\""), HasSubstr("dualpipe, dualpipev, 1f1b, zb1p, gpipe, interleaved, zbv")));
}

// Forwards only, at one unit each: how long all of them take.
double forward_makespan(const Schedule& schedule) { return reference::makespan(schedule).value_or(-1); }

TEST(ForwardOnly, RunsEveryForwardOnceInPlace) {
  for (const std::string& kind : schedule_kinds()) {
    for (const auto& [P, N] : {Size{2, 4}, {4, 8}, {8, 20}}) {
      const Schedule training = make(kind, P, N);
      for (const int M : {1, 2, 3, N - 1, N, N + 1, 3 * N + 1}) {
        SCOPED_TRACE(detail::str(kind, " ", P, " x ", N, ", ", M, " forward"));
        const Schedule schedule = forward_only(training, M);
        EXPECT_EQ(schedule.num_stages, training.num_stages);
        EXPECT_EQ(schedule.num_micro_batches, M);
        ASSERT_EQ(schedule.ranks.size(), training.ranks.size());
        std::map<Op, int> seen;
        for (int rank = 0; rank < P; ++rank) {
          for (const Step& step : schedule.ranks[static_cast<std::size_t>(rank)]) {
            EXPECT_FALSE(step.overlapped);
            EXPECT_EQ(step.op.pass, Pass::Forward);
            EXPECT_EQ(rank_of(training, step.op.stage, step.op.micro_batch * N / M), rank);
            ++seen[step.op];
          }
        }
        EXPECT_EQ(seen.size(), static_cast<std::size_t>(training.num_stages * M));
        EXPECT_GT(forward_makespan(schedule), 0) << "some rank does not reach its end";
      }
    }
  }
}

// Had one direction waited for the other, the time would be that of two pipelines in a row.
TEST(ForwardOnly, DirectionsInterleave) {
  for (const int P : {2, 4, 8, 16}) {
    for (const int M : {2 * P, 4 * P, 4 * P + 1}) {
      SCOPED_TRACE(detail::str(P, " ranks, ", M, " forward"));
      EXPECT_LE(forward_makespan(forward_only(make("dualpipe", P, 2 * P), M)), M + P - 1);
      // The best there is: the last rank is reached after P-1 units, works 2M, and P-1 ranks follow it.
      EXPECT_EQ(forward_makespan(forward_only(make("dualpipev", P, 2 * P), M)), 2 * M + 2 * P - 2);
      EXPECT_EQ(forward_makespan(forward_only(make("interleaved", P, 2 * P), M)), 2 * M + P - 1);
      EXPECT_EQ(forward_makespan(forward_only(make("1f1b", P, 2 * P), M)), M + P - 1);
    }
  }
  const Schedule schedule = forward_only(make("dualpipe", 4, 8), 8);
  std::vector<int> middle;
  for (const Step& step : schedule.ranks[1]) middle.push_back(step.op.micro_batch);
  EXPECT_THAT(middle, ElementsAre(0, 4, 1, 5, 2, 6, 3, 7));
}

TEST(ForwardOnly, RefusesWhatIsNoSchedule) {
  EXPECT_THROW(forward_only(make("dualpipe", 4, 8), 0), InvalidArgument);
  EXPECT_THROW(forward_only(make("dualpipe", 4, 8), -1), InvalidArgument);
  EXPECT_THROW(forward_only(from_csv("0F0,0B0\n1F1,1B1\n"), 1), InvalidArgument);
}

}  // namespace
}  // namespace dualpipe
