// What a tracer and a profiler see of a device that does its work behind the host.
#include <gmock/gmock.h>

#include <regex>

#include "dualpipe/pipeline/group_collectives.hpp"
#include "dualpipe/pipeline/tracer.hpp"
#include "lagging.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr int kRanks = 2;
constexpr int kMicroBatches = 4;
constexpr auto kKernel = 2ms;

/// A gather within each of two pipelines' counterparts, between nodes whose kernels take their time.
StageFactory slow_stages(const std::shared_ptr<AsyncRank>& rank, const std::shared_ptr<Communicator>& group) {
  return [rank, group](int number) {
    Layer layer(number);
    const Compute compute = [rank, layer](const Tensors& x, const StageContext&) mutable {
      rank->run([] { std::this_thread::sleep_for(kKernel); });
      return Tensors{layer->forward(x[0])};
    };
    Stage stage(layer.ptr());
    stage.compute("slow", compute);
    if (group) stage.communicate("gather", all_gather(group), {0}).communicate("scatter", reduce_scatter(group), {0});
    return stage;
  };
}

/// One step on each rank of `num_pipelines` pipelines; `look` gets what the rank's tracer saw.
void trace_step(const testing::NcclEmulation& emulation, int num_pipelines, bool chains,
                const std::function<void(int rank, const Timeline&)>& look) {
  const Batch batch = random_batch(2 * kMicroBatches, 3);
  run_emulated(emulation, num_pipelines * kRanks, {.timeout = 30s}, [&](const EmulatedRank& emulated) {
    const auto rank = std::make_shared<AsyncRank>(emulated);
    Lagging world(emulated.communicator, rank);
    const auto pipeline = world.split(world.rank() / kRanks, world.rank());
    const auto group = world.split(world.rank() % kRanks, world.rank());
    DualPipe pipe(pipeline, DualPipeOptions{.num_micro_batches = kMicroBatches},
                  slow_stages(rank, chains ? group : nullptr));
    const auto tracer = std::make_shared<Tracer>(pipeline->rank());
    pipe->add_observer(tracer);
    pipe->step(batch, squared_error());
    look(world.rank(), tracer->last());
  });
}

double kernel_seconds() { return std::chrono::duration<double>(kKernel).count(); }

TEST(EmulatedTrace, StepsTakeAsLongAsTheirKernels) {
  const testing::NcclEmulation emulation(kRanks, {.seed = 3});
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
    EXPECT_EQ(forwards, kMicroBatches);  // half of them on each of two stages
    for (const Interval& interval : timeline.intervals)
      if (interval.lane == Lane::send || interval.lane == Lane::receive) {
        EXPECT_LE(interval.begin, interval.end);
      }
  });
}

TEST(EmulatedTrace, NodesAndCollectivesToo) {
  const testing::NcclEmulation emulation(2 * kRanks, {.seed = 3});
  trace_step(emulation, 2, /*chains=*/true, [](int, const Timeline& timeline) {
    int nodes = 0, gathers = 0;
    for (const Interval& interval : timeline.intervals) {
      if (interval.lane == Lane::node && interval.step.op.pass == Pass::Forward && interval.node == "slow") {
        ++nodes;
        EXPECT_GE(interval.end - interval.begin, kernel_seconds());
      }
      gathers += interval.lane == Lane::collective && interval.node == "gather";
    }
    EXPECT_EQ(nodes, kMicroBatches);
    EXPECT_EQ(gathers, 2 * kMicroBatches) << "forward and backward";
  });
}

/// What observers are told late may still end the step.
TEST(EmulatedTrace, AnObserverThatThrowsLeavesGradientsOnAllRanks) {
  struct Angry final : Observer {
    void record(const Interval&) override { throw std::runtime_error("the disk is full"); }
  };
  const testing::NcclEmulation emulation(kRanks, {.seed = 3});
  const Batch batch = random_batch(2 * kMicroBatches, 3);
  run_emulated(emulation, kRanks, {.timeout = 30s}, [&](const EmulatedRank& emulated) {
    const auto lagging = std::make_shared<Lagging>(emulated.communicator, std::make_shared<AsyncRank>(emulated));
    DualPipe pipe(lagging, DualPipeOptions{.num_micro_batches = kMicroBatches}, as_factory(layer));
    if (lagging->rank() == 1) pipe->add_observer(std::make_shared<Angry>());
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }), HasSubstr("the disk is full"));
    for (const auto& parameter : pipe->parameters()) EXPECT_FALSE(parameter.grad().defined());
  });
}

TEST(EmulatedTrace, AProfilerSeesEachStepAndNode) {
  const testing::NcclEmulation emulation(2 * kRanks, {.seed = 3});
  trace_step(emulation, 2, /*chains=*/true, [](int, const Timeline&) {});
  for (int rank = 0; rank < 2 * kRanks; ++rank) {
    const std::vector<std::string> ranges = emulation.ranges(rank);
    // Steps begin where none is open, nodes within a step and not within each other, also those that launch.
    const auto names = [&](const std::string& pattern) {
      return std::count_if(ranges.begin(), ranges.end(),
                           [&](const std::string& range) { return std::regex_match(range, std::regex(pattern)); });
    };
    EXPECT_EQ(names(" *[01][FIWB][0-9] (slow|gather|scatter|loss)"),
              names("  [01][FIWB][0-9] (slow|gather|scatter|loss)"));
    EXPECT_EQ(names("  [01][FIWB][0-9] gather"), 2 * kMicroBatches) << "forward and backward";
    EXPECT_EQ(names("  [01]W[0-9] slow"), kMicroBatches);
    EXPECT_EQ(names(" *([01][FIWB][0-9]|.*OVERLAP.*)"), names("([01][FIWB][0-9]|.*OVERLAP.*)"));
    EXPECT_GT(names("([01][FIWB][0-9]|.*OVERLAP.*)"), 0);
  }
  expect_clean(emulation);
}

}  // namespace
}  // namespace dualpipe::test
