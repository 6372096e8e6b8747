#include "dualpipe/planner/search.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/simulator.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/memory.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/lower.hpp"

namespace dualpipe::planner {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::ThrowsMessage;

constexpr double rounding = 1e-9;

CostModel timed(const Costs& costs) { return {.time = costs, .memory = {}}; }

CostModel uneven(int num_stages, double send) {
  CostModel model;
  model.time.send = send;
  model.time.stages.assign(static_cast<std::size_t>(num_stages), {1, 2, 1});
  model.time.stages.front() = {1.3, 2.6, 1.3};
  model.time.stages.back() = {1.5, 3, 1.5};
  return model;
}

CostModel random_model(int num_stages, std::mt19937& random) {
  const auto cost = [&](double low, double high) { return std::uniform_real_distribution(low, high)(random); };
  CostModel model;
  model.time.send = cost(0, 0.5);
  model.time.pair = cost(2.2, 3.2);
  if (cost(0, 1) < 0.3) model.time.ready = {cost(0.4, 1), cost(0.4, 1)};
  for (int s = 0; s < num_stages; ++s) {
    const double backward = cost(1.2, 2.5);
    model.time.stages.push_back({cost(0.5, 1.5), backward, cost(0.3, 0.6) * backward});
  }
  return model;
}

/// All orders of one rank that keep to the limits, up to renaming the micro-batches of a stage and direction. Written
/// down by the rules, without a look at how the search does it.
class RankOrders {
 public:
  struct Line {
    int stage;
    std::vector<int> micro_batches;
    int forwards = 0, backwards = 0, weights = 0;
    std::vector<int> split = {};
  };

  RankOrders(std::vector<Line> lines, int activations, int weights)
      : lines_(std::move(lines)), activations_(activations), weights_(weights) {
    extend();
  }
  const std::vector<std::vector<Step>>& all() const { return all_; }

 private:
  void with(const Step& step, int activations, int weights, const std::function<void()>& change,
            const std::function<void()>& undo) {
    steps_.push_back(step);
    held_ += activations;
    waiting_ += weights;
    change();
    extend();
    undo();
    held_ -= activations;
    waiting_ -= weights;
    steps_.pop_back();
  }

  void extend() {
    bool done = waiting_ == 0;
    for (Line& line : lines_) done = done && line.backwards == static_cast<int>(line.micro_batches.size());
    if (done) all_.push_back(steps_);
    for (Line& line : lines_) {
      const Op forward{Pass::Forward, line.stage, turn(line, line.forwards)};
      const bool may_forward = forward.micro_batch >= 0 && held_ < activations_;
      const auto begin_forward = [&line] { ++line.forwards; };
      const auto undo_forward = [&line] { --line.forwards; };
      if (may_forward) with({forward, std::nullopt}, 1, 0, begin_forward, undo_forward);
      for (Line& other : lines_) {
        if (other.backwards == other.forwards) continue;
        const int micro_batch = turn(other, other.backwards);
        for (const Pass pass : {Pass::Backward, Pass::BackwardInput}) {
          const bool split = pass == Pass::BackwardInput;
          if (split && waiting_ == weights_) continue;
          const Op backward{pass, other.stage, micro_batch};
          const auto begin = [&other, split, micro_batch] {
            ++other.backwards;
            if (split) other.split.push_back(micro_batch);
          };
          const auto undo = [&other, split] {
            --other.backwards;
            if (split) other.split.pop_back();
          };
          if (&other == &line) with({backward, std::nullopt}, -1, split ? 1 : 0, begin, undo);
          if (may_forward)
            with(
                {forward, backward}, 0, split ? 1 : 0, [&] { begin_forward(), begin(); },
                [&] { undo_forward(), undo(); });
        }
      }
      if (line.weights < static_cast<int>(line.split.size()))
        with(
            {{Pass::BackwardWeight, line.stage, line.split[static_cast<std::size_t>(line.weights)]}, std::nullopt}, 0,
            -1, [&line] { ++line.weights; }, [&line] { --line.weights; });
    }
  }

  static int turn(const Line& line, int index) {
    return index < static_cast<int>(line.micro_batches.size()) ? line.micro_batches[static_cast<std::size_t>(index)]
                                                               : -1;
  }

  std::vector<Line> lines_;
  int activations_, weights_;
  int held_ = 0, waiting_ = 0;
  std::vector<Step> steps_;
  std::vector<std::vector<Step>> all_;
};

/// The fastest of all orders of two ranks.
double fastest(const RankOrders& first, const RankOrders& second, int num_micro_batches, const Costs& costs,
               Publish publish) {
  double best = std::numeric_limits<double>::infinity();
  Schedule schedule{.name = "all", .num_stages = 2, .num_micro_batches = num_micro_batches, .ranks = {{}, {}}};
  detail::Simulator simulator(costs, publish);
  for (const auto& a : first.all()) {
    schedule.ranks[0] = a;
    for (const auto& b : second.all()) {
      schedule.ranks[1] = b;
      if (simulator.load(schedule)) best = std::min(best, simulator.makespan());  // else they wait for each other
    }
  }
  return best;
}

TEST(Search, FindsTheFastestOfAllOrdersOfSmallSchedules) {
  Costs plain{.send = 0.1};
  Costs overlapping{.pair = 2.3, .send = 0.3};
  Costs uneven_costs = uneven(2, 0.2).time;
  Costs slow = plain;
  slow.slowdown = {1, 1.4};
  struct Size {
    const char* kind;
    int micro_batches, activations, weights;
    std::vector<Costs> costs;  // fewer where there are many orders
  };
  for (const Size& size : {Size{"dualpipe", 2, 2, 1, {plain, overlapping, uneven_costs, slow}},
                           Size{"dualpipe", 2, 1, 0, {plain, overlapping, uneven_costs, slow}},
                           Size{"1f1b", 2, 2, 2, {plain, overlapping, uneven_costs, slow}},
                           Size{"1f1b", 3, 1, 1, {plain, overlapping, uneven_costs, slow}},
                           Size{"1f1b", 3, 2, 1, {overlapping}}, Size{"dualpipe", 3, 2, 1, {uneven_costs}}}) {
    const bool both_ways = std::string(size.kind) == "dualpipe";
    std::vector<int> there, back;  // micro-batches that enter at rank 0, at rank 1
    for (int m = 0; m < size.micro_batches; ++m)
      (both_ways && m >= (size.micro_batches + 1) / 2 ? back : there).push_back(m);
    std::vector<RankOrders::Line> first{{0, there}}, second{{1, there}};
    if (both_ways) {
      first.push_back({1, back});
      second.push_back({0, back});
    }
    const RankOrders orders0(first, size.activations, size.weights), orders1(second, size.activations, size.weights);
    ASSERT_GT(orders0.all().size(), 0U);
    ASSERT_LT(orders0.all().size() * orders1.all().size(), 3'000'000U);
    for (const Costs& costs : size.costs)
      for (const Publish publish : {Publish::early, Publish::atomic}) {
        const double truth = fastest(orders0, orders1, size.micro_batches, costs, publish);
        SearchOptions options{.publish = publish, .evaluations = 10'000};
        options.limits.activations = size.activations;
        options.limits.weights = size.weights;
        const SearchResult found = search(ScheduleSpec{size.kind, 2, size.micro_batches}, timed(costs), options);
        const std::string which = detail::str(size.kind, " of ", size.micro_batches, ", pair ", costs.pair, ", send ",
                                              costs.send, publish == Publish::early ? ", early" : ", atomic");
        EXPECT_NEAR(found.makespan, truth, truth * rounding) << which;
        EXPECT_LE(found.bound.makespan, truth * (1 + rounding)) << which;
        EXPECT_GT(found.bound.makespan, 0.5 * truth) << which;
      }
  }
}

/// Everything that is promised of a result.
void expect_sound(const SearchResult& result, const CostModel& model, const SearchOptions& options,
                  const std::string& which) {
  EXPECT_THAT(violations(result.schedule), IsEmpty()) << which;
  EXPECT_NO_THROW(dry_run(lower(result.schedule, options.publish))) << which;
  EXPECT_NEAR(simulate_makespan(result.schedule, model.time, options.publish), result.makespan,
              result.makespan * rounding)
      << which;
  EXPECT_GE(result.makespan, result.bound.makespan * (1 - rounding)) << which;
  for (const RankMemory& rank : memory(result.schedule, model.memory)) {
    EXPECT_LE(rank.peak_activations, result.limits.activations) << which;
    EXPECT_LE(rank.peak_weights, result.limits.weights) << which;
    EXPECT_LE(rank.peak, result.limits.memory * (1 + rounding)) << which;
  }
  for (const SearchStart& start : result.starts) {
    if (start.fits) {
      EXPECT_LE(result.makespan, start.makespan * (1 + rounding)) << which << ", " << start.name;
    }
  }
}

TEST(Search, IsSoundForAnyKindAndSize) {
  constexpr unsigned seed = 5;
  std::mt19937 random(seed);
  for (const std::string& kind : schedule_kinds())
    for (const auto& [ranks, micro_batches] :
         {std::pair{1, 1}, {1, 4}, {2, 1}, {2, 6}, {3, 5}, {4, 8}, {5, 3}, {5, 12}, {8, 2}, {8, 20}}) {
      const ScheduleSpec spec{kind, ranks, micro_batches};
      const int stages = kind == "dualpipev" || kind == "zbv" || kind == "interleaved" ? 2 * ranks : ranks;
      const CostModel model = random_model(stages, random);
      const SearchOptions options{.publish = random() % 2 == 0 ? Publish::early : Publish::atomic, .evaluations = 300};
      const SearchResult result = search(spec, model, options);
      expect_sound(result, model, options, detail::str(kind, " ", ranks, " x ", micro_batches, ", seed ", seed));
      EXPECT_EQ(result.schedule.num_stages, stages);
      EXPECT_EQ(result.schedule.num_micro_batches, micro_batches);
      EXPECT_EQ(result.schedule.ranks.size(), static_cast<std::size_t>(ranks));
    }
}

TEST(Search, KeepsThePlacementOfAGivenSchedule) {
  const Schedule start = make_schedule({"dualpipe", 4, 8});
  const CostModel model = uneven(4, 0.3);
  const SearchOptions options{.evaluations = 3000};
  const SearchResult result = search(start, model, options);
  expect_sound(result, model, options, "given");
  EXPECT_EQ(placement(result.schedule), placement(start));
  EXPECT_EQ(result.starts.front().name, "dualpipe");
  EXPECT_EQ(result.limits.activations, 5);  // what the start holds
  EXPECT_EQ(result.limits.weights, 2);
  EXPECT_LT(result.makespan, result.starts.front().makespan);
}

TEST(Search, KeepsToTheLimits) {
  CostModel model = uneven(8, 0.1);
  model.memory = {.activation = 2, .weight = 1, .state = 10, .stages = {}};
  SearchOptions options{.evaluations = 2000};
  options.limits = {.activations = 6, .weights = 0};
  const ScheduleSpec spec{"dualpipe", 8, 20};
  const SearchResult few = search(spec, model, options);
  expect_sound(few, model, options, "6 activations");
  EXPECT_FALSE(few.starts.front().fits);  // DualPipe holds 9
  for (const auto& rank : few.schedule.ranks)
    for (const Step& step : rank) EXPECT_NE(step.op.pass, Pass::BackwardWeight);

  options.limits = {.activations = 100, .weights = 100, .memory = 20 + 2 * 4 + 1};
  const SearchResult bytes = search(spec, model, options);
  expect_sound(bytes, model, options, "four activations and a weight part");
  EXPECT_GT(bytes.makespan, few.makespan);

  options.limits.memory = 21;
  EXPECT_THAT([&] { search(spec, model, options); },
              ThrowsMessage<InvalidArgument>(HasSubstr("needs at least 22 of memory")));
  options.limits = {.activations = 1};
  EXPECT_THAT([&] { search(ScheduleSpec{"dualpipev", 2, 4}, CostModel{}, options); },
              ThrowsMessage<InvalidArgument>(HasSubstr("holds 2 activations of each micro-batch, but the limit is 1")));
}

TEST(Search, TheSeedDecides) {
  const ScheduleSpec spec{"dualpipe", 6, 12};
  const CostModel model = uneven(6, 0.4);
  const SearchOptions options{.evaluations = 3000, .seed = 7};
  const SearchResult first = search(spec, model, options), second = search(spec, model, options);
  EXPECT_EQ(first.schedule, second.schedule);
  EXPECT_EQ(first.makespan, second.makespan);
  EXPECT_EQ(first.evaluations, second.evaluations);
}

TEST(Search, EndsWhenToldTo) {
  const ScheduleSpec spec{"dualpipe", 8, 20};
  SearchOptions options{.evaluations = 1'000'000'000};
  int calls = 0;
  options.progress = [&](const SearchProgress& progress) {
    EXPECT_EQ(progress.budget, 1'000'000'000);
    EXPECT_GE(progress.best, progress.bound);
    return ++calls < 2;
  };
  const CostModel model = timed({.send = 0.1});
  expect_sound(search(spec, model, options), model, options, "stopped");
  EXPECT_EQ(calls, 2);
  options.progress = {};
  options.seconds = 0.2;
  const SearchResult result = search(spec, model, options);
  expect_sound(result, model, options, "timed");
  EXPECT_LT(result.evaluations, options.evaluations);
}

// The bound holds for orders that the search had no hand in.
TEST(LowerBound, IsBelowEveryPublishedOrder) {
  constexpr unsigned seed = 6;
  std::mt19937 random(seed);
  for (int round = 0; round < 20; ++round)
    for (const std::string& kind : schedule_kinds()) {
      const ScheduleSpec spec{kind, 4, 8};
      const Schedule order = make_schedule(spec);
      const CostModel model = random_model(order.num_stages, random);
      for (const Publish publish : {Publish::early, Publish::atomic}) {
        // One evaluation: the bound is computed with the limits of the order.
        const LowerBound bound = search(order, model, {.publish = publish, .evaluations = 1}).bound;
        EXPECT_LE(bound.makespan, simulate_makespan(order, model.time, publish) * (1 + rounding))
            << kind << ", round " << round << ", seed " << seed;
      }
    }
}

TEST(LowerBound, IsExactWhereTheoryKnowsTheBest) {
  const auto bound_of = [](const ScheduleSpec& spec, const CostModel& model, Publish publish) {
    return search(spec, model, {.publish = publish, .evaluations = 1}).bound;
  };
  // N(F+B) + (P/2-1)F, reached by DualPipe with results published early.
  EXPECT_NEAR(bound_of({"dualpipe", 8, 20}, {}, Publish::early).makespan, 63, rounding);
  EXPECT_NEAR(bound_of({"dualpipe", 16, 64}, {}, Publish::early).makespan, 199, rounding);
  // (N+P-1)(F+B), reached by 1F1B, which lets no weight part wait.
  const LowerBound one_way = bound_of({"1f1b", 4, 9}, {}, Publish::atomic);
  EXPECT_NEAR(one_way.makespan, (9 + 4 - 1) * 3, rounding);
  EXPECT_EQ(one_way.rank, 3);
  EXPECT_NEAR(one_way.head, 3, rounding);
  EXPECT_NEAR(one_way.busy, 27, rounding);
  EXPECT_NEAR(one_way.tail, 6, rounding);
  // One micro-batch goes its way alone.
  EXPECT_NEAR(bound_of({"1f1b", 8, 1}, timed({.send = 0.5}), Publish::early).makespan, 8 + 8 + 1 + 14 * 0.5, rounding);
  // On rank 3 an activation of stage 3 is held for the 5 F up to the last stage and the 5 I back, one of stage 4 for 4
  // and 4; the first comes after 3 F. With room for two of them:
  SearchOptions options{.evaluations = 1};
  options.limits.activations = 2;
  const LowerBound held = search(ScheduleSpec{"dualpipe", 8, 20}, CostModel{}, options).bound;
  EXPECT_TRUE(held.by_memory);
  EXPECT_NEAR(held.makespan, 3 + (10 * 10 + 10 * 8) / 2.0, rounding);
}

// At the peak of activations and of waiting weight parts that DualPipe has. Where the first and the last stage are the
// slow ones, which the same ranks hold, DualPipe leaves nothing to remove: those ranks never wait.
TEST(Search, RemovesTheBubbleThatUnevenCostsLeave) {
  const auto removed = [](const CostModel& model) {
    const SearchResult result = search(ScheduleSpec{"dualpipe", 8, 20}, model, {.evaluations = 20'000});
    EXPECT_EQ(result.limits.activations, 9);
    EXPECT_EQ(result.limits.weights, 4);
    const double published = result.starts.front().makespan;
    return (published - result.makespan) / (published - result.bound.makespan);
  };
  const SearchResult ends = search(ScheduleSpec{"dualpipe", 8, 20}, uneven(8, 0.1), {.evaluations = 1});
  EXPECT_NEAR(ends.starts.front().makespan, 84, rounding);
  EXPECT_NEAR(ends.bound.makespan, 84, rounding);

  EXPECT_GT(removed(timed({.send = 0.1})), 0.4);
  CostModel middle = timed({.send = 0.1, .stages = std::vector<StageCosts>(8, {1, 2, 1})});
  middle.time.stages[3] = {1.3, 2.6, 1.3};
  middle.time.stages[4] = {1.5, 3, 1.5};
  EXPECT_GT(removed(middle), 0.4);
}

}  // namespace
}  // namespace dualpipe::planner
