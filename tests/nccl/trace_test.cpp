// What a tracer and a profiler see of a device that does its work behind the host.
#include <gmock/gmock.h>

#include "dualpipe/runtime/group_collectives.hpp"
#include "dualpipe/runtime/tracer.hpp"
#include "lagging.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::Contains;
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

TEST(EmulatedTrace, AProfilerSeesEachStepAndNode) {
  const testing::NcclEmulation emulation(2 * kRanks, {.seed = 3});
  trace_step(emulation, 2, /*chains=*/true, [](int, const Timeline&) {});
  const std::vector<std::string> ranges = emulation.ranges(0);
  EXPECT_THAT(ranges, Contains("0F0"));
  EXPECT_THAT(ranges, Contains("0F0 slow"));
  EXPECT_THAT(ranges, Contains("0W0 slow"));
  expect_clean(emulation);
}

}  // namespace
}  // namespace dualpipe::test
