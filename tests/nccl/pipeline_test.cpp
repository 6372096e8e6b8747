#include "pipeline/pipeline.hpp"

#include <gmock/gmock.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <regex>

#include "dualpipe/pipeline/group_collectives.hpp"
#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/train/sharded_optimizer.hpp"
#include "forwarding.hpp"
#include "lagging_communicator.hpp"
#include "pipeline/chains.hpp"

// DualPipe over the NCCL communicator, on devices that lag behind their hosts.
namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;
using namespace std::chrono_literals;

struct Setting {
  int num_ranks = 2;
  int num_micro_batches = 4;
  std::string schedule = "dualpipe";
  bool communicator_per_edge = false;
  bool one_transfer_at_a_time = false;
  bool both_ready = false;
  std::uint64_t seed = 1;
};

using Body = std::function<void(DualPipe&, const std::shared_ptr<Communicator>&)>;

void run_pipeline(const testing::NcclEmulation& emulation, const Setting& setting, const Body& body,
                  const Decorate& decorate = nullptr, std::chrono::milliseconds timeout = 30s) {
  run_emulated(
      emulation, setting.num_ranks,
      {.timeout = timeout,
       .communicator_per_edge = setting.communicator_per_edge,
       .start_when_both_ready = setting.both_ready},
      [&](const EmulatedRank& rank) {
        const auto lagging =
            std::make_shared<LaggingCommunicator>(rank.communicator, std::make_shared<AsyncRank>(rank));
        DualPipe pipe(lagging,
                      DualPipeOptions{.num_micro_batches = setting.num_micro_batches, .schedule = setting.schedule},
                      as_factory(layer));
        body(pipe, lagging);
      },
      decorate);
}

void run_pipeline(const Setting& setting, const Body& body, const Decorate& decorate = nullptr) {
  const testing::NcclEmulation emulation(
      setting.num_ranks, {.seed = setting.seed, .one_transfer_at_a_time = setting.one_transfer_at_a_time});
  run_pipeline(emulation, setting, body, decorate);
  expect_clean(emulation);
}

Batch rows_for(const Setting& setting) { return random_batch(2 * setting.num_micro_batches, 5); }

Tensors gradients_of(DualPipe& pipe) {
  Tensors gradients;
  for (const at::Tensor& parameter : pipe->parameters()) gradients.push_back(parameter.grad().clone());
  return gradients;
}

void expect_same_gradients(DualPipe& pipe, const Tensors& before) {
  const Tensors now = gradients_of(pipe);
  ASSERT_EQ(now.size(), before.size());
  for (std::size_t i = 0; i < now.size(); ++i) EXPECT_TRUE(torch::equal(now[i], before[i])) << "a gradient has changed";
}

int num_stages(const Setting& setting) {
  return setting.schedule == "dualpipev" ? 2 * setting.num_ranks : setting.num_ranks;
}

class EmulatedPipeline : public ::testing::TestWithParam<Setting> {};

TEST_P(EmulatedPipeline, TrainsAsOneProcess) {
  const Setting& setting = GetParam();
  const Batch batch = rows_for(setting);
  const Reference expected = reference(layer, num_stages(setting), batch, setting.num_micro_batches, squared_error(),
                                       1.0 / setting.num_micro_batches);
  run_pipeline(setting, [&](DualPipe& pipe, const auto&) {
    for (int step = 1; step <= 2; ++step) {
      expect_micro_batch_losses(pipe->step(batch, squared_error()), expected);
      expect_gradients(pipe, expected, 1e-12, step);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(
    Ranks, EmulatedPipeline,
    ::testing::Values(
        Setting{.num_ranks = 2, .num_micro_batches = 4}, Setting{.num_ranks = 4, .num_micro_batches = 8},
        Setting{.num_ranks = 8, .num_micro_batches = 16},
        Setting{.num_ranks = 4, .num_micro_batches = 8, .communicator_per_edge = true},
        Setting{.num_ranks = 8, .num_micro_batches = 16, .one_transfer_at_a_time = true},
        Setting{.num_ranks = 4, .num_micro_batches = 8, .schedule = "dualpipev"},
        Setting{.num_ranks = 4, .num_micro_batches = 8, .communicator_per_edge = true, .both_ready = true},
        Setting{.num_ranks = 8, .num_micro_batches = 16, .one_transfer_at_a_time = true, .both_ready = true}),
    [](const auto& tested) {
      const Setting& s = tested.param;
      return s.schedule + std::to_string(s.num_ranks) + (s.communicator_per_edge ? "PerEdge" : "") +
             (s.one_transfer_at_a_time ? "OneAtATime" : "") + (s.both_ready ? "BothReady" : "");
    });

/// Whose clock differs by a million seconds from rank to rank, as those of hosts do; counts events with times.
class OtherClock final : public ForwardingDevice {
 public:
  OtherClock(std::shared_ptr<detail::DeviceApi> inner, int rank, std::atomic<int>& timed_events)
      : ForwardingDevice(std::move(inner)), offset_(1e6 * rank), timed_events_(timed_events) {}
  detail::DeviceEvent create_event(bool timed) override {
    timed_events_ += timed;
    return inner_->create_event(timed);
  }
  double time_of(detail::DeviceEvent event) override { return inner_->time_of(event) + offset_; }

 private:
  const double offset_;
  std::atomic<int>& timed_events_;
};

/// How long each rank says that a transfer, collective or sum has taken, by what they share.
class Durations {
 public:
  void add(int replica, const Timeline& timeline) {
    const std::lock_guard lock(mutex_);
    for (const Interval& each : timeline.intervals) {
      std::string what;
      if (each.lane == Lane::send || each.lane == Lane::receive)
        what = detail::str("transfer of ", to_string(each.step), " in replica ", replica);
      if (each.lane == Lane::collective) what = to_string(each.step) + " " + each.node;
      if (each.lane == Lane::reduction) what = detail::str("sum of ", to_string(each.step));
      if (!what.empty()) all_[what].push_back(each.end - each.begin);
    }
  }
  void expect_equal(bool collectives) const {
    int alone = 0;
    for (const auto& [what, durations] : all_) {
      alone += durations.size() == 1;
      for (const double each : durations) EXPECT_NEAR(each, durations.front(), 1e-6) << what;
    }
    EXPECT_EQ(alone, 0);
    EXPECT_EQ(std::any_of(all_.begin(), all_.end(), [](const auto& each) { return each.first.ends_with("gather"); }),
              collectives);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::vector<double>> all_;
};

/// Two replicas; with `communicates` each stage also has collectives over them, which double what it computes.
void expect_replicas_equal_one_process(const std::string& kind, bool communicates, bool one_at_a_time) {
  SCOPED_TRACE(kind + (communicates ? ", with collectives" : "") + (one_at_a_time ? ", one transfer at a time" : ""));
  constexpr int kPipeline = 2, kReplicas = 2;
  const double factor = communicates ? kReplicas : 1;
  const Model model = [factor](int stage) {
    Layer module(stage);
    return Piece{module.ptr(),
                 [module, factor](const Tensors& x) mutable { return Tensors{module->forward(x[0]) * factor}; }};
  };
  const auto batch_of = [](int replica) { return random_batch(2 * kMicroBatches, 10 + replica); };
  std::vector<Reference> truths;
  for (int replica = 0; replica < kReplicas; ++replica)
    truths.push_back(reference(model, kind == "dualpipev" ? 2 * kPipeline : kPipeline, batch_of(replica), kMicroBatches,
                               squared_error(), 1.0 / (kReplicas * kMicroBatches)));
  Reference sum = truths[0];
  for (auto& [stage, gradients] : sum.gradients)
    for (auto& [name, gradient] : gradients) gradient = gradient + truths[1].gradients.at(stage).at(name);

  const testing::NcclEmulation emulation(kPipeline * kReplicas, {.one_transfer_at_a_time = one_at_a_time});
  std::atomic<int> timed_events{0};
  Durations durations;
  const auto body = [&](const EmulatedRank& rank) {
    const auto lagging = std::make_shared<LaggingCommunicator>(rank.communicator, std::make_shared<AsyncRank>(rank));
    const Mesh mesh(lagging, {.pipeline = kPipeline, .data = kReplicas, .expert = kReplicas});
    const auto stages = [&](int number) {
      Layer module(number);
      Stage stage(module);
      stage.compute("layer", [module](const at::Tensor& x) mutable { return module->forward(x); });
      if (communicates)
        stage.communicate("gather", all_gather(mesh.expert()), {0})
            .communicate("scatter", reduce_scatter(mesh.expert()), {0});
      return stage;
    };
    DualPipe pipe(mesh, {.num_micro_batches = kMicroBatches, .schedule = kind}, stages,
                  [](const std::string&) { return false; });
    const auto tracer = std::make_shared<Tracer>(lagging->rank());
    for (int step = 1; step <= 3; ++step) {
      if (step == 3) {
        EXPECT_EQ(timed_events, 0) << "nobody observes";
        lagging->barrier().wait();
        pipe->add_observer(tracer);
      }
      pipe->step(batch_of(mesh.replica()), squared_error());
      expect_gradients(pipe, sum, 1e-12, step);
    }
    const auto& intervals = tracer->last().intervals;
    EXPECT_EQ(std::count_if(intervals.begin(), intervals.end(),
                            [](const Interval& each) { return each.lane == Lane::reduction; }),
              std::ssize(pipe->local_stages()));
    durations.add(mesh.replica(), tracer->last());
  };
  run_emulated(emulation, kPipeline * kReplicas, {.timeout = 30s}, body,
               [&](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
                 device = std::make_shared<OtherClock>(device, rank, timed_events);
               });
  durations.expect_equal(communicates);
  expect_clean(emulation);
}

TEST(EmulatedPipeline, ReplicasTrainAsOneProcess) {
  for (const std::string kind : {"dualpipe", "dualpipev", "1f1b"}) {
    expect_replicas_equal_one_process(kind, /*communicates=*/false, /*one_at_a_time=*/false);
    expect_replicas_equal_one_process(kind, /*communicates=*/false, /*one_at_a_time=*/true);
    expect_replicas_equal_one_process(kind, /*communicates=*/true, /*one_at_a_time=*/false);
  }
}

TEST(EmulatedPipeline, AShardedOptimizerTrainsAsOneProcess) {
  constexpr int kPipeline = 2, kReplicas = 2;
  constexpr double kRate = 0.1;
  const auto batch_of = [](int replica) { return random_batch(2 * kMicroBatches, 10 + replica); };
  std::vector<Reference> truths;
  for (int replica = 0; replica < kReplicas; ++replica)
    truths.push_back(reference(layer, kPipeline, batch_of(replica), kMicroBatches, squared_error(),
                               1.0 / (kReplicas * kMicroBatches)));
  const testing::NcclEmulation emulation(kPipeline * kReplicas);
  run_emulated(emulation, kPipeline * kReplicas, {.timeout = 30s}, [&](const EmulatedRank& rank) {
    const auto lagging = std::make_shared<LaggingCommunicator>(rank.communicator, std::make_shared<AsyncRank>(rank));
    const Mesh mesh(lagging, {.pipeline = kPipeline, .data = kReplicas});
    DualPipe pipe(mesh, {.num_micro_batches = kMicroBatches, .shard_optimizer = true}, as_factory(layer));
    ShardedOptimizer optimizer(pipe, std::make_unique<torch::optim::SGD>(pipe->owned_parameters(), kRate));
    const std::vector<std::string> connected = emulation.connections(lagging->rank());
    pipe->step(batch_of(mesh.replica()), squared_error());
    optimizer.step();
    EXPECT_EQ(emulation.connections(lagging->rank()), connected);
    for (const auto& child : pipe->named_children()) {
      const int stage = std::stoi(child.key().substr(5));
      const auto before = layer(stage).module->named_parameters();
      for (const auto& item : child.value()->named_parameters()) {
        at::Tensor expected = before[item.key()].detach();
        for (const Reference& truth : truths) expected = expected - kRate * truth.gradients.at(stage).at(item.key());
        EXPECT_LE(difference(item.value(), expected), 1e-12) << child.key() << item.key();
      }
    }
  });
  expect_clean(emulation);
}

TEST(EmulatedPipeline, AStepReadsNothingFromTheDeviceButItsData) {
  const Setting setting{.num_ranks = 4, .num_micro_batches = 8};
  const Batch batch = rows_for(setting);
  run_pipeline(setting, [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
    pipe->step(batch, squared_error());
    auto& lagging = static_cast<LaggingCommunicator&>(*communicator);
    lagging.take_counts();
    pipe->step(batch, squared_error());
    const CallCounts counts = lagging.take_counts();
    // This test computes on the host, so it waits for received tensors and for the gradients of each stage. Losses come
    // with the votes of the hosts.
    EXPECT_EQ(counts.host_waits, counts.receives + 2);
    ASSERT_EQ(counts.collectives, 2);
    Signature gradients;  // all stages have the same sizes
    for (const at::Tensor& parameter : pipe->children()[0]->parameters())
      gradients.push_back({.dtype = at::kDouble, .sizes = parameter.sizes().vec()});
    for (const Signature& collected : counts.collected) EXPECT_EQ(to_string(collected), to_string(gradients));
  });
}

TEST(EmulatedPipeline, ConnectsBeforeTheFirstStepAndHoldersSideBySide) {
  const Setting setting{.num_ranks = 4, .num_micro_batches = 8};
  const auto meeting = std::make_shared<Meeting>(4);
  const testing::NcclEmulation emulation(setting.num_ranks);
  run_pipeline(
      emulation, setting,
      [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
        const std::vector<std::string> connected = emulation.connections(communicator->rank());
        pipe->step(rows_for(setting), squared_error());
        (void)pipe->clip_grad_norm_(1.0);
        EXPECT_EQ(emulation.connections(communicator->rank()), connected);
        EXPECT_EQ(emulation.communicators(communicator->rank()).size(), 3U)
            << "the world's two, and one of the holders";
      },
      [&](int, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
        nccl = std::make_shared<MeetingNccl>(nccl, meeting);
      },
      60s);
  EXPECT_FALSE(meeting->failed());
  expect_clean(emulation);
}

/// All gradients of one step, by rank and in the order of the parameters.
std::vector<Tensors> gradients_of_step(const Setting& setting) {
  std::vector<Tensors> gradients(setting.num_ranks);
  const Batch batch = rows_for(setting);
  run_pipeline(setting, [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
    pipe->step(batch, squared_error());
    gradients[communicator->rank()] = gradients_of(pipe);
  });
  return gradients;
}

class Repetitions : public ::testing::TestWithParam<int> {};

TEST_P(Repetitions, AnyDelaysGiveTheSameBits) {
  const auto first = gradients_of_step({.seed = 1});
  for (int i = 0; i < 25; ++i) {
    const auto seed = static_cast<std::uint64_t>(100 * (GetParam() + 1) + i);
    for (const bool both_ready : {false, true}) {
      const auto again = gradients_of_step({.both_ready = both_ready, .seed = seed});
      for (std::size_t r = 0; r < first.size(); ++r)
        for (std::size_t p = 0; p < first[r].size(); ++p)
          ASSERT_TRUE(torch::equal(first[r][p], again[r][p]))
              << "seed " << seed << ", rank " << r << ", parameter " << p << (both_ready ? ", both ready" : "");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, Repetitions, ::testing::Range(0, 8));

// ---------------------------------------------------------------------------------------------------------------------
// failures

TEST(EmulatedFailure, AnErrorInUserCodeLeavesGradientsAndEndsAllRanks) {
  const Setting setting{.num_ranks = 4, .num_micro_batches = 8};
  std::atomic<int> failed{0};
  run_pipeline(setting, [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
    pipe->step(rows_for(setting), squared_error());
    const Tensors before = gradients_of(pipe);
    std::atomic<int> calls{0};
    const LossFn fails = [&](const Tensors& outputs, const Tensors& targets) {
      if (communicator->rank() == 0 && ++calls == 2) throw std::domain_error("the loss is not a number");
      return squared_error()(outputs, targets);
    };
    EXPECT_THAT(message_of([&] { pipe->step(rows_for(setting), fails); }), HasSubstr("the loss is not a number"));
    expect_same_gradients(pipe, before);
    EXPECT_THAT(message_of([&] { pipe->step(rows_for(setting), squared_error()); }), HasSubstr("earlier step failed"));
    ++failed;
  });
  EXPECT_EQ(failed, 4);
}

TEST(EmulatedFailure, AnErrorOfNcclInTheBackgroundEndsAllRanksAndSaysWhatItWas) {
  const Setting setting{.num_ranks = 2, .num_micro_batches = 4};
  const testing::NcclEmulation emulation(setting.num_ranks);
  std::atomic<int> failed{0};
  run_emulated(emulation, setting.num_ranks, {.timeout = 30s}, [&](const EmulatedRank& rank) {
    DualPipe pipe(rank.communicator, DualPipeOptions{.num_micro_batches = setting.num_micro_batches},
                  as_factory(layer));
    pipe->step(rows_for(setting), squared_error());
    if (rank.communicator->rank() == 1) emulation.break_down(1, "unhandled system error: the network is down");
    const std::string message = message_of([&] {
      for (int i = 0; i < 10'000; ++i) {
        pipe->step(rows_for(setting), squared_error());
        std::this_thread::sleep_for(1ms);
      }
    });
    EXPECT_THAT(message, HasSubstr("rank 1: NCCL: unhandled system error: the network is down"));
    ++failed;
  });
  EXPECT_EQ(failed, 2);
  expect_clean(emulation);
}

/// Once stuck, its sends never meet their receives.
class StuckNccl final : public ForwardingNccl {
 public:
  using ForwardingNccl::ForwardingNccl;
  void send(const void* data, std::size_t bytes, int peer, detail::NcclComm comm,
            detail::DeviceStream stream) override {
    // One byte too many, so that the emulated operation hangs.
    inner_->send(data, stuck ? bytes + 1 : bytes, peer, comm, stream);
  }
  std::atomic<bool> stuck{false};
};

TEST(EmulatedFailure, ADeviceThatHangsMeetsTheDeadlineAndNothingIsCommitted) {
  const Setting setting{.num_ranks = 2, .num_micro_batches = 4};
  const testing::NcclEmulation emulation(setting.num_ranks);
  std::shared_ptr<StuckNccl> stuck;
  std::atomic<int> failed{0};
  run_pipeline(
      emulation, setting,
      [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
        pipe->step(rows_for(setting), squared_error());
        const Tensors before = gradients_of(pipe);
        communicator->barrier().wait();
        if (communicator->rank() == 0) stuck->stuck = true;
        communicator->barrier().wait();
        EXPECT_THAT(message_of([&] { pipe->step(rows_for(setting), squared_error()); }),
                    HasSubstr("longer than the timeout of 300 ms"));
        expect_same_gradients(pipe, before);
        ++failed;
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
        if (rank == 0) nccl = stuck = std::make_shared<StuckNccl>(nccl);
      },
      300ms);
  EXPECT_EQ(failed, 2);
  EXPECT_FALSE(emulation.violations().empty()) << "the sizes did not match";
}

TEST(EmulatedFailure, AForgottenEventIsCaughtInAStep) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "data races are the point";
#endif
  Setting setting{.num_ranks = 2, .num_micro_batches = 4};
  const Batch batch = rows_for(setting);
  const Reference expected = reference(layer, 2, batch, setting.num_micro_batches, squared_error(), 0.25);
  std::atomic<int> wrong{0};
  const auto step = [&](DualPipe& pipe, const auto&) {
    const std::vector<double> losses = pipe->step(batch, squared_error()).micro_batch_losses();
    for (std::size_t m = 0; m < losses.size(); ++m)
      if (!(std::abs(losses[m] - expected.losses[m]) < 1e-9)) ++wrong;
  };
  const auto forgets = [](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
    if (rank == 1)
      device = std::make_shared<ForgetfulDevice>(device, ForgetfulDevice::Forgets::to_wait_for_the_transfer);
  };
  // The first values read too early may be those that ranks compare before the first step. A host that is late reads the
  // right ones, so one run in ten shows nothing.
  std::string messages;
  for (setting.seed = 1; setting.seed <= 40; ++setting.seed) {
    const std::string message = message_of([&] { run_pipeline(setting, step, forgets); });
    if (wrong > 0 || message.find("disagree") != std::string::npos ||
        message.find("is not finite") != std::string::npos)
      return;
    messages += message + '\n';
  }
  ADD_FAILURE() << messages;
}

// ---------------------------------------------------------------------------------------------------------------------
// stages that communicate: transfers and collectives on streams of their own, both behind a host that runs ahead

class EmulatedChains : public ::testing::TestWithParam<int> {};

TEST_P(EmulatedChains, TwoPipelinesThatShareEachStageTrainAsOneProcess) {
  const int stage_count = GetParam();  // as many as ranks of each pipeline
  const DualPipeOptions options{.num_micro_batches = 2 * stage_count};
  chains::Stages stages;
  for (int s = 0; s < stage_count; ++s)
    stages.push_back(
        chains::row_of({s % 2 == 0 ? chains::dense(2 * s) : chains::moe(2 * s), chains::shared(2 * s + 1)}));
  const auto batches = chains::batches_of(4 * options.num_micro_batches);
  const auto expected = chains::reference(stages, batches, options.num_micro_batches);
  const std::vector<detail::NcclCommunicatorOptions> kinds{{.timeout = 30s},
                                                           {.timeout = 30s, .communicator_per_edge = true},
                                                           {.timeout = 30s, .start_when_both_ready = true}};
  for (const detail::NcclCommunicatorOptions& kind : kinds) {
    const int num_ranks = chains::kExperts * stage_count;
    const testing::NcclEmulation emulation(num_ranks, {.seed = 11});
    run_emulated(emulation, num_ranks, kind, [&](const EmulatedRank& rank) {
      const auto world = std::make_shared<LaggingCommunicator>(rank.communicator, std::make_shared<AsyncRank>(rank));
      chains::expect_equals_one_process(world, stages, options, batches, expected);
    });
    expect_clean(emulation);
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, EmulatedChains, ::testing::Values(2, 4));

// ---------------------------------------------------------------------------------------------------------------------
// what a tracer and a profiler see

constexpr int trace_ranks = 2;
constexpr int trace_micro_batches = 4;
constexpr auto kernel_time = 2ms;

/// Slow kernels, and collectives between the ranks that hold a stage in each pipeline.
StageFactory slow_stages(const std::shared_ptr<AsyncRank>& rank, const std::shared_ptr<Communicator>& group) {
  return [rank, group](int number) {
    Layer layer(number);
    const Compute compute = [rank, layer](const Tensors& x, const StageContext&) mutable {
      rank->run([] { std::this_thread::sleep_for(kernel_time); });
      return Tensors{layer->forward(x[0])};
    };
    Stage stage(layer.ptr());
    stage.compute("slow", compute);
    if (group) stage.communicate("gather", all_gather(group), {0}).communicate("scatter", reduce_scatter(group), {0});
    return stage;
  };
}

/// Runs one step on each rank; `look` gets the rank's timeline.
void trace_step(const testing::NcclEmulation& emulation, int num_pipelines, bool chains,
                const std::function<void(int rank, const Timeline&)>& look) {
  const Batch batch = random_batch(2 * trace_micro_batches, 3);
  run_emulated(emulation, num_pipelines * trace_ranks, {.timeout = 30s}, [&](const EmulatedRank& emulated) {
    const auto rank = std::make_shared<AsyncRank>(emulated);
    LaggingCommunicator world(emulated.communicator, rank);
    const auto pipeline = world.split(world.rank() / trace_ranks, world.rank());
    const auto group = world.split(world.rank() % trace_ranks, world.rank());
    DualPipe pipe(pipeline, DualPipeOptions{.num_micro_batches = trace_micro_batches},
                  slow_stages(rank, chains ? group : nullptr));
    const auto tracer = std::make_shared<Tracer>(pipeline->rank());
    pipe->add_observer(tracer);
    pipe->step(batch, squared_error());
    look(world.rank(), tracer->last());
  });
}

double kernel_seconds() { return std::chrono::duration<double>(kernel_time).count(); }

TEST(EmulatedTrace, StepsTakeAsLongAsTheirKernels) {
  const testing::NcclEmulation emulation(trace_ranks, {.seed = 3});
  trace_step(emulation, 1, /*chains=*/false, [](int, const Timeline& timeline) {
    int forwards = 0;
    double end = 0;
    for (const Interval& interval : timeline.intervals) {
      if (interval.lane != Lane::compute) continue;
      EXPECT_GE(interval.begin, end) << "steps of a stream follow each other";
      end = interval.end;
      if (interval.step.op.pass != Pass::Forward) continue;
      ++forwards;
      EXPECT_GE(interval.end - interval.begin, kernel_seconds()) << to_string(interval.step);
    }
    EXPECT_EQ(forwards, trace_micro_batches);  // half of them on each of two stages
    for (const Interval& interval : timeline.intervals)
      if (interval.lane == Lane::send || interval.lane == Lane::receive) {
        EXPECT_LE(interval.begin, interval.end);
      }
  });
}

TEST(EmulatedTrace, NodesAndCollectivesToo) {
  const testing::NcclEmulation emulation(2 * trace_ranks, {.seed = 3});
  trace_step(emulation, 2, /*chains=*/true, [](int, const Timeline& timeline) {
    int nodes = 0, gathers = 0;
    for (const Interval& interval : timeline.intervals) {
      if (interval.lane == Lane::node && interval.step.op.pass == Pass::Forward && interval.node == "slow") {
        ++nodes;
        EXPECT_GE(interval.end - interval.begin, kernel_seconds());
      }
      gathers += interval.lane == Lane::collective && interval.node == "gather";
    }
    EXPECT_EQ(nodes, trace_micro_batches);
    EXPECT_EQ(gathers, 2 * trace_micro_batches) << "forward and backward";
  });
}

/// In a step with slow kernels, of all ranks.
int kernels_beside_waiting_transfers(bool start_when_both_ready) {
  const Batch batch = random_batch(4 * kRanks, 3);
  const testing::NcclEmulation emulation(kRanks, {.seed = 3});
  run_emulated(emulation, kRanks, {.timeout = 30s, .start_when_both_ready = start_when_both_ready},
               [&](const EmulatedRank& emulated) {
                 const auto rank = std::make_shared<AsyncRank>(emulated);
                 DualPipe pipe(std::make_shared<LaggingCommunicator>(emulated.communicator, rank),
                               DualPipeOptions{.num_micro_batches = 2 * kRanks}, slow_stages(rank, nullptr));
                 for (int step = 0; step < 2; ++step) pipe->step(batch, squared_error());
               });
  int kernels = 0;
  for (int rank = 0; rank < kRanks; ++rank) kernels += emulation.kernels_beside_waiting(rank);
  return kernels;
}

TEST(EmulatedPipeline, TransfersThatStartTogetherLeaveTheDeviceToItsKernels) {
  const int at_once = kernels_beside_waiting_transfers(false);
  const int together = kernels_beside_waiting_transfers(true);
  RecordProperty("kernels_beside_waiting_transfers", detail::str(together, " instead of ", at_once));
  EXPECT_LT(together, at_once);
}

/// Observers are called after the device has finished, and may still fail the step.
TEST(EmulatedTrace, AnObserverThatThrowsLeavesGradientsOnAllRanks) {
  struct Angry final : Observer {
    void record(const Interval&) override { throw std::runtime_error("the disk is full"); }
  };
  const testing::NcclEmulation emulation(trace_ranks, {.seed = 3});
  const Batch batch = random_batch(2 * trace_micro_batches, 3);
  const Setting setting{.num_ranks = trace_ranks, .num_micro_batches = trace_micro_batches};
  run_pipeline(emulation, setting, [&](DualPipe& pipe, const std::shared_ptr<Communicator>& communicator) {
    if (communicator->rank() == 1) pipe->add_observer(std::make_shared<Angry>());
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }), HasSubstr("the disk is full"));
    for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
  });
}

TEST(EmulatedTrace, AProfilerSeesEachStepAndNode) {
  const testing::NcclEmulation emulation(2 * trace_ranks, {.seed = 3});
  trace_step(emulation, 2, /*chains=*/true, [](int, const Timeline&) {});
  for (int rank = 0; rank < 2 * trace_ranks; ++rank) {
    const std::vector<std::string> ranges = emulation.ranges(rank);
    // Steps are not nested; nodes lie directly within a step.
    const auto names = [&](const std::string& pattern) {
      return std::count_if(ranges.begin(), ranges.end(),
                           [&](const std::string& range) { return std::regex_match(range, std::regex(pattern)); });
    };
    EXPECT_EQ(names(" *[01][FIWB][0-9] (slow|gather|scatter|loss)"),
              names("  [01][FIWB][0-9] (slow|gather|scatter|loss)"));
    EXPECT_EQ(names("  [01][FIWB][0-9] gather"), 2 * trace_micro_batches) << "forward and backward";
    EXPECT_EQ(names("  [01]W[0-9] slow"), trace_micro_batches);
    EXPECT_EQ(names(" *([01][FIWB][0-9]|.*OVERLAP.*)"), names("([01][FIWB][0-9]|.*OVERLAP.*)"));
    EXPECT_GT(names("([01][FIWB][0-9]|.*OVERLAP.*)"), 0);
  }
  expect_clean(emulation);
}

}  // namespace
}  // namespace dualpipe::test
