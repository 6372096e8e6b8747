// How much of what stages communicate hides under compute. Nodes sleep for a given time and collectives cross a delayed
// network, so that many ranks fit on few cores. Ranks are pipelines times groups of two.
//
//   dualpipe-run -n 2 -- dualpipe-bench-overlap --pair    one pair, beside its halves with communication exposed
//   dualpipe-run -n 8 -- dualpipe-bench-overlap           steps of a pipeline of four
#include <sys/prctl.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "dualpipe/comm/socket.hpp"
#include "dualpipe/dual_pipe.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/runtime/group_collectives.hpp"
#include "dualpipe/runtime/pair.hpp"
#include "dualpipe/runtime/tracer.hpp"
#include "dualpipe/testing/communicators.hpp"

namespace {

using namespace dualpipe;
using Clock = std::chrono::steady_clock;

struct Flags {
  int num_micro_batches = 20;
  int layers = 1;
  double attention = 10, mlp = 10, communication = 10;  // milliseconds
  int steps = 3;
  bool pair = false;
};

/// A node that takes a given time in each of forward, input part and weight part.
struct Sleep : torch::autograd::Function<Sleep> {
  static void pass(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& weight, double seconds) {
    context->saved_data["seconds"] = seconds;
    pass(seconds);
    return x * weight;
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list gradients) {
    const double seconds = context->saved_data["seconds"].toDouble();
    const bool weight = context->needs_input_grad(1);
    if (context->needs_input_grad(0)) pass(seconds);
    if (weight) pass(seconds);
    return {gradients[0], weight ? gradients[0].sum() : torch::Tensor(), torch::Tensor()};
  }
};

struct SleepingImpl : torch::nn::Module {
  SleepingImpl() { weight = register_parameter("weight", torch::ones({})); }
  torch::Tensor weight;
};
TORCH_MODULE(Sleeping);

/// Layers of attention, dispatch, MLP, combine.
Stage make_stage(const Flags& flags, const std::shared_ptr<Communicator>& group) {
  const Sleeping module;
  Stage stage(module.ptr());
  const auto sleep = [&](double milliseconds) {
    return [module, milliseconds](const Tensors& inputs, const StageContext&) {
      Tensors outputs = inputs;
      // Every node has an input part, also that of the first stage.
      outputs[0] = Sleep::apply(inputs[0].requires_grad() ? inputs[0] : inputs[0].detach().requires_grad_(),
                                module->weight, milliseconds / 1e3);
      return outputs;
    };
  };
  const auto collective = all_to_all(group);
  for (int layer = 0; layer < flags.layers; ++layer)
    stage.compute("attention", sleep(flags.attention))
        .communicate("dispatch", collective, {0, 1})
        .compute("MLP", sleep(flags.mlp))
        .communicate("combine", collective, {0, 1});
  return stage;
}

Tensors inputs_of(std::int64_t rows, int group_size) {
  return {torch::ones({rows, 4}), torch::full({group_size}, rows / group_size, torch::kLong)};
}

double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}
double max_over(Communicator& comm, double value) {
  return comm.all_reduce({torch::tensor({value}, torch::kDouble)}, Reduce::max).take()[0].item<double>();
}
double sum_over(Communicator& comm, double value) {
  return comm.all_reduce({torch::tensor({value}, torch::kDouble)}).take()[0].item<double>();
}

/// Runs a pair in `order`; `exposed` waits for each collective where it is launched.
double time_pair(Communicator& comm, const Stage& stage, const std::vector<Piece>& order, bool exposed) {
  const Tensors none;
  const auto context = [&](int micro_batch) { return StageContext{0, micro_batch, 0, true, none}; };
  Tensors inputs = inputs_of(4, comm.size());
  inputs[0].set_requires_grad(true);
  StageActivation before = stage.forward(inputs, context(0));
  ForwardPass forward(stage, inputs, context(1));
  BackwardPass backward(before, {torch::ones_like(before.outputs[0]), torch::Tensor()});
  comm.barrier().wait();
  const auto begin = Clock::now();
  PairListener listener;
  for (const Piece& piece : order) {
    run_pair({&piece, 1}, &forward, &backward, listener);
    if (!exposed) continue;
    forward.settle();
    backward.settle();
  }
  settle_last(&forward, &backward, listener, /*block=*/true);
  return max_over(comm, milliseconds_since(begin));
}

void pair(const std::shared_ptr<Communicator>& comm, const std::shared_ptr<Communicator>& network, const Flags& flags) {
  const Stage stage = make_stage(flags, network);
  const std::string chain = stage.structure();
  std::vector<Piece> halves = pair_order(chain, "");
  for (const Piece& piece : pair_order("", chain)) halves.push_back(piece);
  const auto table = pair_order(chain, chain);
  if (comm->rank() == 0) std::printf("%-44s %8s %8s\n", "order", "ms", "ratio");
  double exposed = 0;
  const auto measure = [&](const char* name, const std::vector<Piece>& order, bool expose) {
    double best = 1e300;
    for (int i = 0; i < flags.steps; ++i) best = std::min(best, time_pair(*comm, stage, order, expose));
    if (exposed == 0) exposed = best;
    if (comm->rank() == 0) std::printf("%-44s %8.2f %8.3f\n", name, best, best / exposed);
  };
  measure("forward, then backward, waiting for each", halves, true);
  measure("forward, then backward", halves, false);
  measure("the order as a trace shows it", table, false);
  measure("the order as a host launches it", launch_order(chain, chain, table), false);
}

void pipeline(const std::shared_ptr<Communicator>& world, const std::shared_ptr<Communicator>& pipe_comm,
              const std::shared_ptr<Communicator>& network, const Flags& flags) {
  DualPipe pipe(pipe_comm, DualPipeOptions{.num_micro_batches = flags.num_micro_batches},
                [&](int) { return make_stage(flags, network); });
  auto tracer = std::make_shared<Tracer>(pipe_comm->rank());
  pipe->add_observer(tracer);
  std::vector<Batch> parts(static_cast<std::size_t>(flags.num_micro_batches));
  for (Batch& part : parts) {
    part.inputs = inputs_of(4, network->size());
    part.targets = {torch::zeros({1})};
  }
  const Batch batch = Batch::from_micro_batches(parts);
  const LossFn loss = [](const Tensors& outputs, const Tensors&) { return outputs[0].mean(); };
  for (int step = 0; step <= flags.steps; ++step) {
    world->barrier().wait();
    const auto begin = Clock::now();
    pipe->step(batch, loss);
    const double wall = max_over(*world, milliseconds_since(begin));
    double in_pairs = 0, computing = 0, communicating = 0;
    std::vector<std::pair<double, double>> pairs;
    for (const Interval& interval : tracer->last().intervals)
      if (interval.lane == Lane::compute && interval.step.overlapped) pairs.emplace_back(interval.begin, interval.end);
    const auto inside = [&](const Interval& interval) {
      return std::any_of(pairs.begin(), pairs.end(), [&](const auto& span) {
        return span.first <= interval.begin && interval.begin < span.second;
      });
    };
    for (const auto& [from, to] : pairs) in_pairs += to - from;
    for (const Interval& interval : tracer->last().intervals) {
      if (interval.lane == Lane::node && inside(interval)) computing += interval.end - interval.begin;
      if (interval.lane == Lane::collective && inside(interval)) communicating += interval.end - interval.begin;
    }
    in_pairs = sum_over(*world, in_pairs);
    computing = sum_over(*world, computing);
    communicating = sum_over(*world, communicating);
    if (world->rank() == 0 && step > 0)
      std::printf("step %7.1f ms; in pairs, of all ranks: %.0f ms, compute %.0f, communication %.0f, exposed %.1f %%\n",
                  wall, 1e3 * in_pairs, 1e3 * computing, 1e3 * communicating,
                  100 * (in_pairs - computing) / communicating);
  }
}

}  // namespace

int main(int argc, char** argv) {
  World world;
  try {
    CLI::App app{"How much of the stages' communication hides under compute"};
    Flags flags;
    app.add_option("--microbatches", flags.num_micro_batches, "micro-batches of a step")->capture_default_str();
    app.add_option("--layers", flags.layers, "layers of a stage")->capture_default_str()->check(CLI::PositiveNumber);
    app.add_option("--attention-ms", flags.attention, "time of each of F, I and W")->capture_default_str();
    app.add_option("--mlp-ms", flags.mlp, "time of each of F, I and W")->capture_default_str();
    app.add_option("--communication-ms", flags.communication, "time of a dispatch or combine")->capture_default_str();
    app.add_option("--steps", flags.steps, "measured steps")->capture_default_str()->check(CLI::PositiveNumber);
    app.add_flag("--pair", flags.pair, "one pair only, on two ranks");
    CLI11_PARSE(app, argc, argv);

    at::set_num_threads(1);
    prctl(PR_SET_TIMERSLACK, 1000);  // nanoseconds; the default of 50 us would lengthen every sleep
    world = World::from_env();
    const auto comm = connect_sockets(world);
    DUALPIPE_CHECK(comm->size() % 2 == 0 && (!flags.pair || comm->size() == 2),
                   "groups have two ranks: start an even number, with --pair two; there are ", comm->size());
    const auto pipe_comm = comm->split(comm->rank() % 2, comm->rank());
    const auto group = comm->split(comm->rank() / 2, comm->rank());
    const auto latency = std::chrono::nanoseconds(static_cast<std::int64_t>(flags.communication * 1e6));
    const auto network = testing::delayed_links(group, {latency, 0});
    flags.pair ? pair(comm, network, flags) : pipeline(comm, pipe_comm, network, flags);
    return 0;
  } catch (const std::exception& error) {
    report_failure(world, error);
    return 1;
  }
}
