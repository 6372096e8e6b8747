// Wall time of a step beside what the simulator predicts, with stages whose passes sleep for a given time, and
// processor time per op with stages that do next to nothing. Sleeping needs no core, so eight ranks fit on two.
//
//   dualpipe-run -n 8 -- dualpipe-bench-step
//   dualpipe-run -n 4 -- dualpipe-bench-step --ms 30 --schedule dualpipe dualpipev 1f1b zb1p interleaved zbv
//   --microbatches 8 12 16 dualpipe-run -n 8 -- dualpipe-bench-step --scale 1.3 1 1 1 1 1 1 1.5 --send-ms 1 --schedule
//   dualpipe found.csv dualpipe-run -n 4 -- dualpipe-bench-step --cpu
#include <sys/resource.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/socket.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "dualpipe/stage/as_stage.hpp"
#include "dualpipe/testing/communicators.hpp"
#include "sleep.hpp"

namespace {

using namespace dualpipe;
using Clock = std::chrono::steady_clock;

struct Flags {
  std::vector<int> micro_batches{20};
  std::vector<std::string> schedules{"dualpipe"};
  std::vector<double> scale;
  double milliseconds = 10;
  double send_milliseconds = 0;
  int steps = 5;
  bool cpu = false;

  double scale_of(int stage) const {
    if (scale.empty()) return 1;
    const auto index = static_cast<std::size_t>(stage);
    DUALPIPE_CHECK(index < scale.size(), "--scale gives ", scale.size(), " factors, none for stage ", stage);
    return scale[index];
  }
  /// Nobody asks the first stage for an input gradient, so where its backward is split, all of it is the weight part.
  Costs costs(int num_stages) const {
    const double unit = milliseconds;
    Costs costs{unit, 2 * unit, unit, 3 * unit, send_milliseconds};
    for (int stage = 0; stage < num_stages; ++stage) {
      const double own = scale_of(stage) * unit;
      costs.stages.push_back({own, 2 * own, stage == 0 ? 2 * own : own});
    }
    return costs;
  }
};

struct SleepingStageImpl : torch::nn::Module {
  explicit SleepingStageImpl(const Passes& of) : passes(of) { weight = register_parameter("weight", torch::ones({})); }
  torch::Tensor forward(const torch::Tensor& x) { return Sleep::apply(x, weight, &passes); }
  Passes passes;
  torch::Tensor weight;
};
TORCH_MODULE(SleepingStage);

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double sum_over_ranks(Communicator& comm, double value, Reduce reduce) {
  return comm.all_reduce({torch::tensor({value}, torch::kDouble)}, reduce).take()[0].item<double>();
}

Batch batch_of(int num_micro_batches, int width) {
  Batch batch;
  batch.inputs = {torch::ones({num_micro_batches, width})};
  batch.targets = {torch::zeros({num_micro_batches, width})};
  return batch;
}

torch::Tensor mean_loss(const Tensors& outputs, const Tensors&) { return outputs[0].mean(); }

/// Milliseconds of each step on the slowest rank, ascending.
std::vector<double> measure(Communicator& comm, DualPipe& pipe, int num_micro_batches, int steps) {
  const Batch batch = batch_of(num_micro_batches, 1);
  std::vector<double> times;
  pipe->step(batch, mean_loss);
  for (int step = 0; step < steps; ++step) {
    comm.barrier().wait();
    const auto begin = Clock::now();
    pipe->step(batch, mean_loss);
    const double mine = std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
    times.push_back(sum_over_ranks(comm, mine, Reduce::max));
  }
  std::sort(times.begin(), times.end());
  return times;
}

void sleeping(const std::shared_ptr<Communicator>& comm, const Flags& flags) {
  const std::shared_ptr<Communicator> network =
      flags.send_milliseconds > 0
          ? testing::delayed_links(comm,
                                   {std::chrono::nanoseconds(static_cast<std::int64_t>(flags.send_milliseconds * 1e6))})
          : comm;
  if (comm->rank() == 0)
    std::printf("%-12s %4s %-7s %12s %12s %12s %9s\n", "schedule", "N", "publish", "predicted ms", "median ms",
                "min ms", "ratio");
  for (const std::string& kind : flags.schedules)
    for (const int num_micro_batches : flags.micro_batches)
      for (const Publish publish : {Publish::early, Publish::atomic}) {
        const DualPipeOptions options{.num_micro_batches = num_micro_batches, .schedule = kind, .publish = publish};
        DualPipe pipe(network, options, [&](int stage) {
          return as_stage(
              SleepingStage(Passes{calibrated(flags.scale_of(stage) * flags.milliseconds / 1e3), stage == 0}));
        });
        const double predicted =
            planner::report(simulate(pipe->schedule(), flags.costs(pipe->schedule().num_stages), publish).timeline)
                .makespan;
        const std::vector<double> times = measure(*comm, pipe, num_micro_batches, flags.steps);
        if (comm->rank() != 0) continue;
        const double median = times[times.size() / 2];
        std::printf("%-12s %4d %-7s %12.1f %12.1f %12.1f %9.4f\n", kind.c_str(), num_micro_batches,
                    publish == Publish::early ? "early" : "atomic", predicted, median, times.front(),
                    median / predicted);
        std::fflush(stdout);
      }
}

void processor_time(const std::shared_ptr<Communicator>& comm, const Flags& flags) {
  if (comm->rank() == 0) std::printf("%-12s %14s %14s\n", "schedule", "cpu us per op", "wall us per op");
  const int num_micro_batches = flags.micro_batches.front();
  for (const std::string& kind : flags.schedules) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches, .schedule = kind},
                  [](int) { return as_stage(torch::nn::Linear(16, 16)); });
    const Batch batch = batch_of(num_micro_batches, 16);
    for (int step = 0; step < 10; ++step) pipe->step(batch, mean_loss);
    // One op is one forward or one backward of one micro-batch on one stage.
    const double ops = 2.0 * pipe->schedule().num_stages * num_micro_batches * flags.steps;
    comm->barrier().wait();
    const auto begin = Clock::now();
    const double cpu = cpu_seconds();
    for (int step = 0; step < flags.steps; ++step) pipe->step(batch, mean_loss);
    const double spent = sum_over_ranks(*comm, cpu_seconds() - cpu, Reduce::sum);
    const double wall = std::chrono::duration<double>(Clock::now() - begin).count();
    if (comm->rank() == 0) {
      std::printf("%-12s %14.1f %14.1f\n", kind.c_str(), 1e6 * spent / ops, 1e6 * wall / ops * comm->size());
      std::fflush(stdout);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  World world;
  try {
    CLI::App app{"Step time beside the simulator's prediction, with stages that sleep"};
    Flags flags;
    app.add_option("--microbatches", flags.micro_batches, "micro-batches of a step, one or several numbers")
        ->capture_default_str();
    app.add_option("--schedule", flags.schedules, "kinds or CSV files")->capture_default_str();
    app.add_option("--ms", flags.milliseconds, "time of each pass: F, I and W")->capture_default_str();
    app.add_option("--send-ms", flags.send_milliseconds, "latency added to each transfer")->capture_default_str();
    app.add_option("--scale", flags.scale, "factor of each stage's times, first to last")->check(CLI::PositiveNumber);
    app.add_option("--steps", flags.steps, "measured steps")->capture_default_str()->check(CLI::PositiveNumber);
    app.add_flag("--cpu", flags.cpu, "processor time per op of near-empty stages instead");
    CLI11_PARSE(app, argc, argv);
    if (flags.cpu && app.count("--steps") == 0) flags.steps = 200;

    at::set_num_threads(1);
    sleep_precisely();
    world = World::from_env();
    const auto comm = connect_sockets(world);
    (flags.cpu ? processor_time : sleeping)(comm, flags);
    return 0;
  } catch (const std::exception& error) {
    report_failure(world, error);
    return 1;
  }
}
