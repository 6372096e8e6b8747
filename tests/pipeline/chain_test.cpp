// Pipelines whose stages communicate: mixture-of-experts layers with a group of two ranks per stage, cut anywhere.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "pipeline/chains.hpp"
#include "pipeline/collective_wrappers.hpp"
#include "pipeline/network.hpp"

namespace dualpipe::test::chains {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;

constexpr int kPipeline = 2;

void expect_equals_one_process(const Stages& stages, const std::string& kind, int num_micro_batches, Network network,
                               Publish publish) {
  const DualPipeOptions options{.num_micro_batches = num_micro_batches, .schedule = kind, .publish = publish};
  const auto batches = batches_of(4 * num_micro_batches);
  const auto expected = reference(stages, batches, num_micro_batches);
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    expect_equals_one_process(over(network, world), stages, options, batches, expected);
  });
}

// --- gradients
// -------------------------------------------------------------------------------------------------------------------

using Case = std::tuple<std::string, Network, Publish>;
class ChainGradients : public ::testing::TestWithParam<Case> {};

TEST_P(ChainGradients, LayersWithExpertsAndWithout) {
  const auto& [kind, network, publish] = GetParam();
  const int num_micro_batches = 6;
  const int num_stages = make_schedule({kind, kPipeline, num_micro_batches}).num_stages;
  for (const int variant : {0, 1, 2}) {
    SCOPED_TRACE("variant " + std::to_string(variant));
    Stages stages;
    for (int s = 0; s < num_stages; ++s) {
      // All with experts; every second one dense; two layers with collectives in a row between.
      if (variant == 2)
        stages.push_back(row_of({moe(2 * s), twice(2 * s), moe(2 * s + 1)}));
      else
        stages.push_back(variant == 1 && s % 2 == 1 ? dense(s) : moe(s));
    }
    expect_equals_one_process(stages, kind, num_micro_batches, network, publish);
  }
}

std::string case_name(const ::testing::TestParamInfo<Case>& info) {
  const auto& [kind, network, publish] = info.param;
  const std::string networks[] = {"direct", "serial", "delayed"};
  return "schedule_" + kind + "_" + networks[static_cast<int>(network)] +
         (publish == Publish::early ? "_early" : "_atomic");
}

INSTANTIATE_TEST_SUITE_P(Chain, ChainGradients,
                         ::testing::Values(Case{"dualpipe", Network::direct, Publish::early},
                                           Case{"dualpipe", Network::direct, Publish::atomic},
                                           Case{"dualpipe", Network::serial, Publish::early},
                                           Case{"dualpipe", Network::delayed, Publish::early},
                                           Case{"dualpipev", Network::direct, Publish::early},
                                           Case{"dualpipev", Network::serial, Publish::early},
                                           Case{"dualpipev", Network::delayed, Publish::early},
                                           Case{"1f1b", Network::delayed, Publish::early},
                                           Case{"zb1p", Network::direct, Publish::early},
                                           Case{"zbv", Network::delayed, Publish::atomic}),
                         case_name);

TEST(Chain, StagesCutAtAnyNode) {
  const unsigned seed = 99;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 12; ++round) {
    const std::string kind = round % 2 == 0 ? "dualpipe" : "dualpipev";
    const auto num_stages = static_cast<std::size_t>(round % 2 == 0 ? 2 : 4);
    std::vector<Node> row = row_of({dense(0), moe(1), twice(2), moe(3), dense(4)});
    // From 1 to 7 nodes in each stage.
    std::vector<std::size_t> cuts{0, row.size()};
    bool fits = false;
    while (!fits) {
      cuts.resize(2);
      while (cuts.size() < num_stages + 1) cuts.push_back(1 + random() % (row.size() - 1));
      std::sort(cuts.begin(), cuts.end());
      fits = true;
      for (std::size_t s = 0; s < num_stages; ++s) {
        const std::size_t length = cuts[s + 1] - cuts[s];
        fits = fits && length >= 1 && length <= (num_stages == 2 ? 9U : 7U);
      }
    }
    Stages stages;
    std::string text;
    for (std::size_t s = 0; s < num_stages; ++s) {
      stages.emplace_back(row.begin() + static_cast<std::ptrdiff_t>(cuts[s]),
                          row.begin() + static_cast<std::ptrdiff_t>(cuts[s + 1]));
      text += " " + std::to_string(cuts[s + 1] - cuts[s]);
    }
    SCOPED_TRACE(kind + " with stages of" + text + " nodes");
    expect_equals_one_process(stages, kind, 6, round % 3 == 0 ? Network::delayed : Network::direct, Publish::early);
  }
}

/// What one pipeline does not train may be what the other one does, and both hold experts.
TEST(Chain, MicroBatchesOfWeight0StillCarryTheOthersOfTheGroup) {
  constexpr int num_micro_batches = 4;
  for (const std::string kind : {"dualpipe", "1f1b"}) {
    SCOPED_TRACE(kind);
    auto batches = batches_of(4 * num_micro_batches);
    batches[0].weights = {3, 0, 1, 0};
    batches[1].weights = {1, 2, 0, 5};
    for (Batch& batch : batches)
      for (int m = 0; m < num_micro_batches; ++m)
        if (batch.weights[m] == 0) batch.targets[0].narrow(0, 4 * m, 4).fill_(std::nan(""));
    const Stages stages{moe(0), row_of({moe(1), dense(2)})};
    const auto expected = reference(stages, batches, num_micro_batches);
    run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
      const Place place(world);
      DualPipe pipe(place.pipeline, {.num_micro_batches = num_micro_batches, .schedule = kind},
                    factory_of(stages, place.member, place.group));
      EXPECT_TRUE(std::isfinite(pipe->step(batches[place.member], moe_loss()).loss.item<double>()));
      expect_gradients(pipe, expected[place.member], kGradientTolerance);
    });
  }
}

TEST(Chain, TheModelMayEndInACollective) {
  std::vector<Node> last = moe(1);
  last.pop_back();  // merged by the loss
  expect_equals_one_process({moe(0), last}, "dualpipe", 6, Network::delayed, Publish::early);
  expect_equals_one_process({moe(0), last}, "1f1b", 5, Network::direct, Publish::early);
}

// --- order and memory
// ---------------------------------------------------------------------------------------------------------------------

TEST(Chain, MembersOfAGroupLaunchCollectivesInOneOrderWhateverTheyTake) {
  const int num_micro_batches = 8;
  const auto batches = batches_of(4 * num_micro_batches);
  std::array<std::vector<std::string>, kExperts * kPipeline> logs;
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(over(Network::delayed, world));
    auto& log = logs[world->rank()];
    DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = num_micro_batches},
                  factory_of(
                      {moe(0), row_of({moe(1), moe(2)})}, place.member, place.group,
                      [&log](std::shared_ptr<Collective> inner, std::string name) {
                        return std::make_shared<LoggedCollective>(std::move(inner), std::move(name), log);
                      },
                      [&](Tensors&) {
                        if (place.member == 1) std::this_thread::sleep_for(std::chrono::microseconds(300));
                      }));
    pipe->step(batches[place.member], moe_loss());
  });
  for (int rank = 0; rank < kPipeline; ++rank) {
    EXPECT_FALSE(logs[kExperts * rank].empty());
    EXPECT_EQ(logs[kExperts * rank], logs[kExperts * rank + 1]);
  }
}

int resident_pages() {
  int size = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> size >> resident;
  return resident;
}

TEST(Chain, LiveActivationsAreThoseOfTheScheduleAndMemoryStaysFlat) {
  for (const int num_micro_batches : {4, 12}) {
    const auto batches = batches_of(4 * num_micro_batches);
    std::atomic<int> after_warm_up{0};
    run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
      const Place place(world);
      // The first node of each chain leaves a token in its graph; tokens alive are activations alive.
      std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> tokens;
      std::size_t peak = 0;
      const auto alive = [&] {
        std::erase_if(tokens, [](const auto& token) { return token.expired(); });
        return tokens.size();
      };
      DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = num_micro_batches},
                    factory_of({moe(0), moe(1)}, place.member, place.group, nullptr, [&](Tensors& t) {
                      if (t[rows].defined() || t[order].defined()) return;  // only after attention ...
                      if (!t[x].requires_grad()) return;
                      const auto token = torch::rand_like(t[x]);
                      tokens.emplace_back(
                          c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(token.storage().unsafeGetStorageImpl()));
                      t[x] = t[x] * token;  // ... which keeps it for its backward
                      peak = std::max(peak, alive());
                    }));
      const int num_steps = num_micro_batches == 4 ? 100 : 2;
      for (int step = 0; step < num_steps; ++step) {
        pipe->step(batches[place.member], moe_loss());
        EXPECT_EQ(alive(), 0U);
        if (step == 20) {
          world->barrier().wait();
          if (world->rank() == 0) after_warm_up = resident_pages();
        }
      }
      world->barrier().wait();
      if (world->rank() == 0 && after_warm_up > 0) {
        EXPECT_LT(resident_pages(), after_warm_up + 512) << "pages of 4 KiB";
      }
      // Twice, since merge is seen too: attention and merge of a stage leave one token each.
      EXPECT_LE(peak, 2U * (kPipeline + 1));
      EXPECT_GE(peak, 2U * kPipeline);
    });
  }
}

TEST(Chain, TheTracerSeesCollectivesAndNodes) {
  const int num_micro_batches = 6;
  const auto batches = batches_of(4 * num_micro_batches);
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(over(Network::delayed, world));
    DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = num_micro_batches},
                  factory_of({moe(0), dense(1)}, place.member, place.group));
    auto tracer = std::make_shared<Tracer>(place.pipeline->rank());
    pipe->add_observer(tracer);
    pipe->step(batches[place.member], moe_loss());
    std::map<std::string, int> collectives, nodes;
    std::vector<Interval> steps;
    for (const Interval& interval : tracer->last().intervals) {
      EXPECT_LE(interval.begin, interval.end);
      if (interval.lane == Lane::collective) ++collectives[interval.node + static_cast<char>(interval.step.op.pass)];
      if (interval.lane == Lane::node) ++nodes[interval.node + static_cast<char>(interval.step.op.pass)];
      if (interval.lane == Lane::compute) steps.push_back(interval);
    }
    // Half of the micro-batches run stage 0 here. Backwards are B or I, as the schedule has them.
    const int half = num_micro_batches / 2;
    EXPECT_EQ(collectives["dispatch0F"], half);
    EXPECT_EQ(collectives["combine0F"], half);
    EXPECT_EQ(collectives["dispatch0B"] + collectives["dispatch0I"], half);
    EXPECT_EQ(collectives["combine0B"] + collectives["combine0I"], half);
    EXPECT_EQ(nodes["expert0F"], half);
    EXPECT_EQ(nodes["merge0F"], half);
    EXPECT_EQ(nodes["attention0 to route0F"], half);
    EXPECT_EQ(nodes["expert0I"], half);
    // Steps follow each other, and each node lies in one.
    for (std::size_t i = 1; i < steps.size(); ++i) EXPECT_LE(steps[i - 1].end, steps[i].begin);
    for (const Interval& interval : tracer->last().intervals) {
      if (interval.lane != Lane::node) continue;
      EXPECT_TRUE(std::any_of(steps.begin(), steps.end(), [&](const Interval& step) {
        return step.begin <= interval.begin && interval.end <= step.end;
      }));
    }
  });
}

// --- failures
// ---------------------------------------------------------------------------------------------------------------------

class Bomb final : public ForwardingCollective {
 public:
  Bomb(std::shared_ptr<Collective> inner, std::string where, int micro_batch)
      : ForwardingCollective(std::move(inner)), where_(std::move(where)), micro_batch_(micro_batch) {}
  Launched forward(Tensors inputs, const StageContext& context) override {
    const bool armed = context.micro_batch == micro_batch_;
    if (armed && where_ == "forward") throw std::runtime_error("boom in forward");
    Launched launched = ForwardingCollective::forward(std::move(inputs), context);
    if (armed && where_ == "take")
      launched.pending =
          join({launched.pending}, [](std::vector<Tensors>) -> Tensors { throw std::runtime_error("boom in take"); });
    return launched;
  }
  Pending backward(std::shared_ptr<void> handle, Tensors gradients) override {
    if (where_ == "backward") throw std::runtime_error("boom in backward");
    return ForwardingCollective::backward(std::move(handle), std::move(gradients));
  }

 private:
  std::string where_;
  int micro_batch_;
};

/// What each rank's step throws.
std::vector<std::string> messages_of(const Stages& stages, const std::function<Wrap(int world_rank)>& wrap,
                                     const std::function<void(int, Tensors&)>& on_compute = nullptr) {
  std::vector<std::string> messages(kExperts * kPipeline);
  std::mutex mutex;
  const auto batches = batches_of(24);
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(world);
    DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = 6},
                  factory_of(stages, place.member, place.group, wrap ? wrap(world->rank()) : nullptr, [&](Tensors& t) {
                    if (on_compute) on_compute(world->rank(), t);
                  }));
    const std::string message = message_of([&] {
      world->barrier().wait();  // a failure is not to meet another rank's constructor
      pipe->step(batches[place.member], moe_loss());
    });
    for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
    const std::lock_guard lock(mutex);
    messages[world->rank()] = message;
  });
  return messages;
}

TEST(Chain, ACollectiveThatThrowsEndsTheStepOnAllRanks) {
  for (const std::string where : {"forward", "take", "backward"}) {
    const auto messages = messages_of({moe(0), moe(1)}, [&](int world_rank) -> Wrap {
      return [&where, world_rank](std::shared_ptr<Collective> inner, const std::string& name) {
        return world_rank == 3 && name == "stage 1 dispatch1" ? std::make_shared<Bomb>(std::move(inner), where, 1)
                                                              : std::move(inner);
      };
    });
    const std::string pass = where == "backward" ? "backward" : "forward";
    EXPECT_THAT(messages, Each(AllOf(HasSubstr("boom in " + where), HasSubstr("rank 3: " + pass + " of stage 1, "),
                                     HasSubstr(", node dispatch1, micro-batch "))));
  }
}

TEST(Chain, SplitsThatDoNotAddUpNameStageNodeAndRankOnAllRanks) {
  const auto messages = messages_of({moe(0), moe(1)}, nullptr, [](int rank, Tensors& t) {
    if (rank == 0 && t[splits].defined() && t[splits].dim() == 1) t[splits] = t[splits] + 1;
  });
  EXPECT_THAT(messages, Each(AllOf(HasSubstr("add up to 6 rows, but tensor 0 is [float64 [4, 6]"),
                                   HasSubstr("rank 0: forward of stage 0, node dispatch0, micro-batch "))));
}

TEST(Chain, RanksThatDisagreeAboutSplitsAllFail) {
  // Member 1 sends back other rows than came.
  const auto messages = messages_of({moe(0), moe(1)}, nullptr, [](int rank, Tensors& t) {
    if (rank == 1 && t[splits].defined() && t[splits].dim() == 2) t[splits] = t[splits].flip(1);
  });
  EXPECT_THAT(messages, Each(AllOf(HasSubstr(" of stage "), HasSubstr(", node combine"), HasSubstr("expects by its"))));
}

TEST(Chain, RanksThatLaunchDifferentCollectivesAllFail) {
  const auto messages = messages_of({moe(0), moe(1)}, [](int world_rank) -> Wrap {
    return [world_rank](std::shared_ptr<Collective> inner, const std::string&) -> std::shared_ptr<Collective> {
      struct Two final : ForwardingCollective {
        using ForwardingCollective::ForwardingCollective;
        Launched forward(Tensors inputs, const StageContext& context) override {
          inputs.insert(inputs.begin(), torch::ones_like(inputs[0]));
          return ForwardingCollective::forward(std::move(inputs), context);
        }
      };
      if (world_rank == 2) return std::make_shared<Two>(std::move(inner));
      return inner;
    };
  });
  for (const std::string& message : messages) EXPECT_THAT(message, HasSubstr("stage "));
}

TEST(Chain, WhatCannotTravelNamesTheStageThatReturnedIt) {
  for (const Publish publish : {Publish::early, Publish::atomic}) {
    std::atomic<int> named{0};
    run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
      const std::string message = message_of([&] {
        DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 2, .schedule = "1f1b", .publish = publish}, [](int) {
          return Stage().compute("sparse",
                                 [](const Tensors& x, const StageContext&) { return Tensors{x[0].to_sparse()}; });
        });
        pipe->step(random_batch(4, 1), squared_error());
      });
      if (message.find("outputs of stage 0 for micro-batch 0: tensor 0 of the message has layout Sparse") !=
          std::string::npos)
        ++named;
    });
    EXPECT_EQ(named, 2);
  }
}

TEST(Chain, StagesChangedAfterConstructionAreRefused) {
  const auto batches = batches_of(24);
  const auto expected = reference({moe(0), moe(1)}, batches, 6);
  run_ranks(kExperts * kPipeline, [&](std::shared_ptr<Communicator> world) {
    const Place place(world);
    std::map<int, Stage> mine;
    const StageFactory inner = factory_of({moe(0), moe(1)}, place.member, place.group);
    const auto factory = [&](int number) { return mine.try_emplace(number, inner(number)).first->second; };
    DualPipe pipe(place.pipeline, DualPipeOptions{.num_micro_batches = 6}, factory);
    const Compute late = [](const Tensors&, const StageContext&) -> Tensors { throw std::runtime_error("late"); };
    for (auto& [number, stage] : mine) {
      const std::string where = detail::str("rank ", world->rank(), ", stage ", number, ": ");
      EXPECT_THAT(message_of([&, &own = stage] { own.compute("late", late); }),
                  AllOf(HasSubstr(where), HasSubstr("node 'late' is added after")));
      EXPECT_THAT(message_of([&, &own = stage] { own.append("more", Stage().compute("late", late)); }),
                  HasSubstr(where));
      EXPECT_THAT(message_of([&, &own = stage] { own.split_backward(false); }), HasSubstr(where));
      EXPECT_THAT(message_of([&, &own = stage] { own.takes(7); }), HasSubstr(where));
      Stage copy = stage;
      copy.compute("late", late);
      EXPECT_EQ(copy.node_names().size(), stage.node_names().size() + 1);
    }
    pipe->step(batches[place.member], moe_loss());
    expect_gradients(pipe, expected[place.member], kGradientTolerance);
  });
}

}  // namespace
}  // namespace dualpipe::test::chains
