#include "dualpipe/schedule/lower.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "programs.hpp"
#include "reference.hpp"

namespace dualpipe {
namespace {

using Do = Instruction::Do;

std::string text(const Program& program, int rank) {
  static const std::map<Do, std::string> names{
      {Do::receive, "receive"}, {Do::wait, "wait"}, {Do::send, "send"}, {Do::release, "release"}};
  std::string out;
  for (const Instruction& instruction : program.ranks[rank])
    out += (out.empty() ? "" : " ") + (instruction.what == Do::compute
                                           ? to_string(instruction.step)
                                           : names.at(instruction.what) + std::to_string(instruction.transfer));
  return out;
}

TEST(Lower, TheSmallestProgramWordForWord) {
  // Two ranks, one micro-batch from each end: 0F0 to 1F0 and back, mirrored for micro-batch 1.
  const Program program = lower(make_schedule({"dualpipe", 2, 2}));
  EXPECT_EQ(program.order, (std::vector<Transfer>{{Payload::activation, 0, 0, 0, 1},
                                                  {Payload::activation, 0, 1, 1, 0},
                                                  {Payload::gradient, 1, 0, 1, 0},
                                                  {Payload::gradient, 1, 1, 0, 1}}));
  EXPECT_EQ(text(program, 0), "0F0 send0 receive1 receive2 wait1 1F1 1B1 send3 wait2 release0 0I0 0W0 release3");
  EXPECT_EQ(text(program, 1), "receive0 0F1 send1 wait0 1F0 1B0 send2 receive3 wait3 release1 0I1 0W1 release2");
}

TEST(Lower, OneRankHasNoTransfers) {
  const Program program = lower(make_schedule({"1f1b", 1, 3}));
  EXPECT_TRUE(program.order.empty());
  EXPECT_NO_THROW(dry_run(program));
}

TEST(Lower, OrderHoldsEveryBoundaryOnceAndTheTurnOfVNever) {
  for_each_schedule(8, [](const Schedule& schedule) {
    std::multiset<Transfer> expected;
    std::set<std::pair<int, int>> backward;
    for (const auto& steps : schedule.ranks)
      for (const Step& step : steps)
        for (const Op& op : reference::ops_of(step))
          if (op.pass != Pass::Forward) backward.insert({op.stage, op.micro_batch});
    for (int stage = 0; stage + 1 < schedule.num_stages; ++stage)
      for (int micro_batch = 0; micro_batch < schedule.num_micro_batches; ++micro_batch) {
        const int low = rank_of(schedule, stage, micro_batch), high = rank_of(schedule, stage + 1, micro_batch);
        if (low == high) continue;
        expected.insert({Payload::activation, stage, micro_batch, low, high});
        if (backward.count({stage, micro_batch}) > 0)
          expected.insert({Payload::gradient, stage + 1, micro_batch, high, low});
      }
    const Program program = lower(schedule);
    EXPECT_EQ(std::multiset<Transfer>(program.order.begin(), program.order.end()), expected);
  });
}

TEST(Lower, EveryProgramRunsWithOneTransferAtATime) {
  for_each_schedule(16, [](const Schedule& schedule) {
    for (const Publish publish : {Publish::early, Publish::atomic}) EXPECT_NO_THROW(dry_run(lower(schedule, publish)));
  });
}

TEST(Lower, StepsStayInOrderAndTransfersFollowThemDirectly) {
  for_each_schedule(8, [](const Schedule& schedule) {
    const Program program = lower(schedule);
    for (std::size_t rank = 0; rank < program.ranks.size(); ++rank) {
      std::vector<Step> steps;
      std::vector<int> transfers;
      Do previous = Do::compute;
      for (const Instruction& instruction : program.ranks[rank]) {
        if (instruction.what == Do::compute) steps.push_back(instruction.step);
        if (is_transfer(instruction)) {
          transfers.push_back(instruction.transfer);
          // An executor walks from the compute over sends and receives, and stops at a wait or release.
          EXPECT_TRUE(previous == Do::compute || previous == Do::send || previous == Do::receive);
        }
        previous = instruction.what;
      }
      EXPECT_EQ(steps, schedule.ranks[rank]);
      EXPECT_TRUE(std::is_sorted(transfers.begin(), transfers.end()));
    }
  });
}

struct Held {
  int unreleased = 0;  // most sends of one edge that are not released when a step begins
  int posted = 0;      // most receives that are posted and not waited for
};

Held most_held(const Program& program) {
  Held most;
  for (const auto& instructions : program.ranks) {
    std::map<int, int> unreleased;
    int posted = 0;
    for (const Instruction& instruction : instructions) {
      const int to = instruction.transfer < 0 ? -1 : program.order[instruction.transfer].to;
      if (instruction.what == Do::send) ++unreleased[to];
      if (instruction.what == Do::release) --unreleased[to];
      if (instruction.what == Do::receive) most.posted = std::max(most.posted, ++posted);
      if (instruction.what == Do::wait) --posted;
      if (instruction.what != Do::compute) continue;
      for (const auto& [peer, count] : unreleased) most.unreleased = std::max(most.unreleased, count);
    }
  }
  return most;
}

TEST(Lower, WhatIsHeldDoesNotDependOnTheNumberOfMicroBatches) {
  for (const std::string& kind : schedule_kinds()) {
    if (kind == "gpipe") continue;  // all forwards before all backwards: its receives are bounded, and tested below
    const Schedule few = make_schedule({kind, 8, 32}), many = make_schedule({kind, 8, 128});
    for (const bool training : {true, false}) {
      const Held a = most_held(lower(training ? few : forward_only(few, 32)));
      const Held b = most_held(lower(training ? many : forward_only(many, 128)));
      EXPECT_EQ(a.unreleased, b.unreleased) << kind << training;
      EXPECT_EQ(a.posted, b.posted) << kind << training;
    }
  }
  for_each_schedule(12, [](const Schedule& schedule) {
    const Held held = most_held(lower(schedule));
    EXPECT_LE(held.unreleased, max_unreleased_sends);
    EXPECT_LE(held.posted, 2 * (max_steps_ahead + 2));
  });
}

TEST(Lower, ReleasesAreMostlyEarlierThanTheLimit) {
  // In steady state the gradient of a micro-batch comes back soon; the limit is for programs where nothing does.
  EXPECT_LE(most_held(lower(make_schedule({"dualpipe", 8, 40}))).unreleased, 6);
  EXPECT_EQ(most_held(lower(forward_only(make_schedule({"1f1b", 8, 40}), 40))).unreleased, max_unreleased_sends);
}

/// A run of a schedule with durations of our own, written without lower()'s help.
struct Emulation {
  std::vector<std::vector<double>> begin;  // of each step; short where the rank got stuck
  std::vector<double> arrival;             // per transfer, -1: never
  double end = 0;
  bool finished = false;
};

struct Durations {
  std::function<double(int rank, const Step&)> step;
  std::function<double(int rank, const Step&, double duration)> ready;  // when results leave, from the step's begin
  double send = 0.1;
  bool serial = true;  // each rank performs one transfer at a time, both ends blocking; else all are independent
};

/// Each rank's transfers run beside its steps, in the order of its program.
Emulation emulate(const Schedule& schedule, const Program& program, const Durations& durations) {
  const std::size_t ranks = schedule.ranks.size();
  std::map<std::tuple<Payload, int, int>, int> index;
  for (int i = 0; i < static_cast<int>(program.order.size()); ++i)
    index[{program.order[i].payload, program.order[i].stage, program.order[i].micro_batch}] = i;
  std::vector<std::vector<int>> queue(ranks);
  for (std::size_t rank = 0; rank < ranks; ++rank)
    for (const Instruction& instruction : program.ranks[rank])
      if (is_transfer(instruction)) queue[rank].push_back(instruction.transfer);

  Emulation run;
  run.begin.resize(ranks);
  run.arrival.assign(program.order.size(), -1);
  std::vector<double> ready(program.order.size(), -1), clock(ranks, 0), line(ranks, 0);
  std::vector<std::size_t> head(ranks, 0);
  const auto transfer_of = [&](const Op& op, int offset) {
    const auto found = index.find(
        {op.pass == Pass::Forward ? Payload::activation : Payload::gradient, op.stage + offset, op.micro_batch});
    return op.pass == Pass::BackwardWeight || found == index.end() ? -1 : found->second;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (std::size_t rank = 0; rank < ranks; ++rank)
      while (run.begin[rank].size() < schedule.ranks[rank].size()) {
        const Step& step = schedule.ranks[rank][run.begin[rank].size()];
        double begin = clock[rank];
        bool can = true;
        for (const Op& op : reference::ops_of(step)) {
          const int input = transfer_of(op, op.pass == Pass::Forward ? -1 : 1);
          if (input < 0) continue;
          can = can && run.arrival[input] >= 0;
          begin = std::max(begin, run.arrival[input]);
        }
        if (!can) break;
        const double duration = durations.step(static_cast<int>(rank), step);
        const double leaves = durations.ready(static_cast<int>(rank), step, duration);
        for (const Op& op : reference::ops_of(step))
          if (const int output = transfer_of(op, 0); output >= 0) ready[output] = begin + leaves;
        run.begin[rank].push_back(begin);
        clock[rank] = begin + duration;
        run.end = std::max(run.end, clock[rank]);
        moved = true;
      }
    if (!durations.serial) {
      for (std::size_t i = 0; i < ready.size(); ++i)
        if (ready[i] >= 0 && run.arrival[i] < 0) run.arrival[i] = ready[i] + durations.send, moved = true;
      continue;
    }
    for (std::size_t rank = 0; rank < ranks; ++rank)
      while (head[rank] < queue[rank].size()) {
        const int transfer = queue[rank][head[rank]];
        const auto from = static_cast<std::size_t>(program.order[transfer].from),
                   to = static_cast<std::size_t>(program.order[transfer].to);
        const auto at = [&](std::size_t end) { return head[end] < queue[end].size() ? queue[end][head[end]] : -1; };
        if (ready[transfer] < 0 || at(from) != transfer || at(to) != transfer) break;
        run.arrival[transfer] = std::max({ready[transfer], line[from], line[to]}) + durations.send;
        line[from] = line[to] = run.arrival[transfer];
        ++head[from], ++head[to];
        moved = true;
      }
  }
  run.finished = true;
  for (std::size_t rank = 0; rank < ranks; ++rank)
    run.finished = run.finished && run.begin[rank].size() == schedule.ranks[rank].size() &&
                   head[rank] == (durations.serial ? queue[rank].size() : 0);
  return run;
}

/// Durations up to three times off the plan, one draw per step.
Durations random_durations(std::mt19937& random, bool serial) {
  Durations durations;
  durations.step = [&random](int, const Step& step) {
    return reference::Costs{}.of(step) * std::uniform_real_distribution<double>(0.3, 3)(random);
  };
  durations.ready = [&random](int, const Step&, double duration) {
    return duration * std::uniform_real_distribution<double>(0.3, 1)(random);
  };
  durations.send = std::uniform_real_distribution<double>(0, 1)(random);
  durations.serial = serial;
  return durations;
}

TEST(Lower, NeverDeadlocksWhateverComputingCosts) {
  constexpr unsigned seed = 7;
  std::mt19937 random(seed);
  int runs = 0;
  for_each_schedule(9, [&](const Schedule& schedule) {
    SCOPED_TRACE(detail::str("seed ", seed, " run ", runs++));
    const Program program = lower(schedule, runs % 2 == 0 ? Publish::early : Publish::atomic);
    EXPECT_TRUE(emulate(schedule, program, random_durations(random, true)).finished);
  });
  EXPECT_GT(runs, 150);
}

TEST(Lower, OneTransferAtATimeCostsLittle) {
  const auto serial = [](int ranks, int micro_batches, double send) {
    const Schedule schedule = make_schedule({"dualpipe", ranks, micro_batches});
    Durations durations{.step = [](int, const Step& step) { return reference::Costs{}.of(step); },
                        .ready =
                            [](int, const Step& step, double duration) {
                              const bool early = step.overlapped || step.op.pass == Pass::Backward;
                              return early ? duration - 1 : duration;
                            },
                        .send = send};
    return emulate(schedule, lower(schedule), durations).end;
  };
  EXPECT_NEAR(serial(8, 20, 0), 63, 1e-9);
  EXPECT_NEAR(serial(16, 64, 0), 199, 1e-9);
  // 64.5, 66 and 202.5 where all transfers are independent of each other.
  EXPECT_LE(serial(8, 20, 0.1), 65.1 * 1.005);
  EXPECT_LE(serial(8, 20, 0.2), 67.2 * 1.005);
  EXPECT_LE(serial(16, 64, 0.1), 203.9 * 1.005);
}

TEST(Lower, AReleaseBehindAWaitIsProvenByItWhateverComputingCosts) {
  constexpr unsigned seed = 11;
  std::mt19937 random(seed);
  int proven = 0;
  for_each_schedule(6, [&](const Schedule& schedule) {
    SCOPED_TRACE(detail::str("seed ", seed));
    const Program program = lower(schedule);
    const Emulation run = emulate(schedule, program, random_durations(random, false));
    ASSERT_TRUE(run.finished);
    // The step of the receiver that needs each transfer.
    std::vector<double> taken(program.order.size(), -1);
    for (std::size_t rank = 0; rank < program.ranks.size(); ++rank) {
      std::size_t step = 0;
      std::vector<int> waits;
      for (const Instruction& instruction : program.ranks[rank]) {
        if (instruction.what == Do::wait) waits.push_back(instruction.transfer);
        if (instruction.what != Do::compute) continue;
        for (const int transfer : waits) taken[transfer] = run.begin[rank][step];
        waits.clear();
        ++step;
      }
    }
    for (const auto& instructions : program.ranks) {
      int waited = -1;
      for (const Instruction& instruction : instructions) {
        if (instruction.what == Do::wait) waited = instruction.transfer;
        if (instruction.what == Do::compute) waited = -1;
        if (instruction.what != Do::release || waited < 0) continue;
        EXPECT_LE(taken[instruction.transfer], run.arrival[waited] + 1e-9);
        ++proven;
      }
    }
  });
  EXPECT_GT(proven, 1000);
}

TEST(Lower, LargeSchedulesFinish) { dry_run(lower(make_schedule({"dualpipe", 64, 512}))); }

TEST(Lower, ResultsOfAPairLeaveInTheOrderInWhichTheyAreReady) {
  const Schedule schedule = make_schedule({"dualpipe", 4, 12});
  for (const bool gradient_first : {false, true}) {
    const Program program =
        lower(schedule, Publish::early, gradient_first ? PairReady{.activation = 1, .gradient = 0.75} : PairReady{});
    EXPECT_NO_THROW(dry_run(program));
    int pairs = 0;
    for (const auto& rank : program.ranks) {
      for (std::size_t i = 0; i + 1 < rank.size(); ++i) {
        if (rank[i].what != Instruction::Do::compute || !rank[i].step.overlapped) continue;
        std::vector<Payload> sent;
        for (std::size_t k = i + 1; k < rank.size() && rank[k].what != Instruction::Do::compute; ++k)
          if (rank[k].what == Instruction::Do::send) sent.push_back(program.order[rank[k].transfer].payload);
        if (sent.size() < 2) continue;
        ++pairs;
        const auto first = gradient_first ? Payload::gradient : Payload::activation;
        EXPECT_EQ(sent.front(), first) << to_string(rank[i].step);
      }
    }
    EXPECT_GT(pairs, 4);
  }
}

}  // namespace
}  // namespace dualpipe
