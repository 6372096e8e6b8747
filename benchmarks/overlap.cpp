// How much of what stages communicate hides under compute. Nodes sleep for a given time and collectives cross a delayed
// network, so that many ranks fit on few cores. Ranks are pipelines times groups of two.
//
//   dualpipe-run -n 2 -- dualpipe-bench-overlap --pair    one pair in several orders, also wrong ones
//   dualpipe-run -n 8 -- dualpipe-bench-overlap           steps of a pipeline of four
//   dualpipe-bench-overlap --host                         what the executor adds to each node, on one rank
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/comm/socket.hpp"
#include "dualpipe/detail/files.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/pipeline/group_collectives.hpp"
#include "dualpipe/pipeline/pair.hpp"
#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/planner/trace.hpp"
#include "dualpipe/testing/communicators.hpp"
#include "sleep.hpp"

namespace {

using namespace dualpipe;
using Clock = std::chrono::steady_clock;

struct Flags {
  int num_micro_batches = 20;
  int layers = 1;
  int weights = 4;
  double attention = 10, mlp = 10, communication = 10;  // milliseconds
  int steps = 3;
  bool pair = false;
  bool host = false;
  std::string trace;
};

/// One weight for each operation of a node, as the linear layers of an attention have theirs.
struct SleepingImpl : torch::nn::Module {
  explicit SleepingImpl(int count) {
    for (int i = 0; i < count; ++i)
      weights.push_back(register_parameter("weight" + std::to_string(i), torch::ones({})));
  }
  Tensors weights;
};
TORCH_MODULE(Sleeping);

/// Layers of attention, dispatch, MLP, combine.
Stage make_stage(const Flags& flags, const std::shared_ptr<Communicator>& group) {
  const Sleeping module(flags.weights);
  Stage stage(module.ptr());
  const auto sleep = [&](double milliseconds) {
    const auto passes =
        std::make_shared<const Passes>(Passes{.seconds = calibrated(milliseconds / 1e3 / flags.weights)});
    return [module, passes](const Tensors& inputs, const StageContext&) {
      Tensors outputs = inputs;
      // Every node has an input part, also that of the first stage.
      if (!inputs[0].requires_grad()) outputs[0] = inputs[0].detach().requires_grad_();
      for (const torch::Tensor& weight : module->weights) outputs[0] = Sleep::apply(outputs[0], weight, passes.get());
      return outputs;
    };
  };
  const auto attention = sleep(flags.attention), mlp = sleep(flags.mlp);
  const auto collective = all_to_all(group);
  for (int layer = 0; layer < flags.layers; ++layer)
    stage.compute("attention", attention)
        .communicate("dispatch", collective, {0, 1})
        .compute("MLP", mlp)
        .communicate("combine", collective, {0, 1});
  return stage;
}

Tensors inputs_of(std::int64_t rows, int group_size) {
  return {torch::ones({rows, 4}), torch::full({group_size}, rows / group_size, torch::kLong)};
}

double now() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }
double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}
double max_over(Communicator& comm, double value) {
  return comm.all_reduce({torch::tensor({value}, torch::kDouble)}, Reduce::max).take()[0].item<double>();
}

/// What a pair does, as the executor would record it: the forward 0F1 with the backward 0B0.
class PairRecorder {
 public:
  explicit PairRecorder(const Stage& stage) : stage_(stage) {}

  /// @param began  when the pair was asked.
  void record(const PairEvent& event, double began) {
    const auto [side, node] = event.op;
    const bool ahead = side == PairSide::forward;
    if (event.kind == PairEvent::Kind::computed) {
      const Pass pass = ahead ? Pass::Forward : side == PairSide::backward ? Pass::BackwardInput : Pass::BackwardWeight;
      record(Lane::node, {pass, 0, ahead ? 1 : 0}, node, {began, now()});
    } else if (event.kind == PairEvent::Kind::received) {
      record(Lane::collective, ahead ? forward_op : backward_op, node, event.pending.span());
    }
  }

  Timeline timeline(const std::string& name, double begin, double end) const {
    Timeline result{name, 1, 1, {{0, Lane::compute, {forward_op, backward_op}, begin, end, {}}}};
    result.intervals.insert(result.intervals.end(), intervals_.begin(), intervals_.end());
    for (Interval& interval : result.intervals) {
      interval.begin -= begin;
      interval.end -= begin;
    }
    return result;
  }

 private:
  static constexpr Op forward_op{Pass::Forward, 0, 1}, backward_op{Pass::Backward, 0, 0};

  void record(Lane lane, const Op& op, int node, const Span& span) {
    intervals_.push_back({0, lane, {op, {}}, span.begin, span.end, stage_.chain_name(node)});
  }

  const Stage& stage_;
  std::vector<Interval> intervals_;
};

struct MeasuredPair {
  double milliseconds = std::numeric_limits<double>::infinity();
  Timeline timeline;  // of this rank
};

/// Runs a pair in `order`; `exposed` waits for each collective where it is launched.
MeasuredPair time_pair(Communicator& comm, const Stage& stage, const std::string& name,
                       const std::vector<PairOp>& order, bool exposed) {
  const Tensors none;
  const auto context = [&](int micro_batch) { return StageContext{0, micro_batch, 0, true, none}; };
  Tensors inputs = inputs_of(4, comm.size());
  inputs[0].set_requires_grad(true);
  StageRun backward = stage.forward(inputs, context(0));
  const Tensors gradients{torch::ones_like(backward.outputs()[0]), torch::Tensor()};
  StageRun forward(stage, inputs, context(1));
  backward.start_backward(gradients);
  comm.barrier().wait();
  const double begin = now();
  PairRecorder recorder(stage);
  PairRun pair(order, &forward, &backward);
  for (;;) {
    const double began = now();
    const std::optional<PairEvent> event = pair.next();
    if (!event && !pair.trails()) break;
    if (event) recorder.record(*event, began);
    if (exposed && event && event->kind == PairEvent::Kind::launched)
      Pending((event->op.side == PairSide::forward ? forward : backward).under_way()).wait();
    if (!event || event->kind == PairEvent::Kind::must_wait) recorder.record(pair.wait(), began);
  }
  const double end = now();
  return {max_over(comm, 1e3 * (end - begin)), recorder.timeline(name, begin, end)};
}

/// "pair.json" and 2: "pair-2.json"
std::string numbered(const std::string& path, int number) {
  const std::size_t dot = path.rfind('.');
  const bool suffix = dot != std::string::npos && path.find('/', dot) == std::string::npos;
  return path.substr(0, suffix ? dot : path.size()) + "-" + std::to_string(number) + (suffix ? path.substr(dot) : "");
}

void pair(const std::shared_ptr<Communicator>& comm, const std::shared_ptr<Communicator>& network, const Flags& flags) {
  const Stage stage = make_stage(flags, network);
  const std::string chain = stage.structure();
  const std::vector<PairOp> forward = pair_order(chain, ""), backward = pair_order("", chain);
  const auto both = [](std::vector<PairOp> first, const std::vector<PairOp>& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
  };
  const std::vector<PairOp> table = pair_order(chain, chain);
  const std::vector<PairOp> launched = launch_order(chain, chain, table);
  // As an ordinary backward does it: each weight part within its node, so that what follows in the chain waits for it.
  std::vector<PairOp> unsplit = launched;
  std::erase_if(unsplit, [](const PairOp& piece) { return piece.side == PairSide::weight; });
  for (std::size_t i = 0; i < unsplit.size(); ++i)
    if (unsplit[i].side == PairSide::backward && chain[static_cast<std::size_t>(unsplit[i].node)] == 'C')
      unsplit.insert(unsplit.begin() + static_cast<std::ptrdiff_t>(i) + 1, {PairSide::weight, unsplit[i].node});
  // A forward node, a backward node, and so on; weight parts last.
  std::vector<PairOp> alternating;
  for (int node = 0; node < static_cast<int>(chain.size()); ++node) {
    alternating.push_back({PairSide::forward, node});
    alternating.push_back({PairSide::backward, static_cast<int>(chain.size()) - 1 - node});
  }
  for (const PairOp& piece : backward)
    if (piece.side == PairSide::weight) alternating.push_back(piece);

  if (comm->rank() == 0) std::printf("%-44s %8s %8s %10s\n", "order", "ms", "ratio", "hidden");
  double slowest = 0;
  int number = 0;
  const auto measure = [&](const char* name, const std::vector<PairOp>& order, bool expose) {
    MeasuredPair best;
    for (int i = 0; i < flags.steps; ++i) {
      MeasuredPair measured = time_pair(*comm, stage, name, order, expose);
      if (measured.milliseconds < best.milliseconds) best = std::move(measured);
    }
    if (slowest == 0) slowest = best.milliseconds;
    ++number;
    if (comm->rank() != 0) return;
    const planner::Overlap communication = planner::report(best.timeline).total().collectives;
    std::printf("%-44s %8.2f %8.3f %8.1f %%\n", name, best.milliseconds, best.milliseconds / slowest,
                100 * communication.hidden / communication.total());
    if (!flags.trace.empty())
      dualpipe::detail::write_file(numbered(flags.trace, number), planner::to_trace(best.timeline));
  };
  measure("forward, then backward, waiting for each", both(forward, backward), true);
  measure("forward, then backward", both(forward, backward), false);
  measure("backward, then forward", both(backward, forward), false);
  measure("alternating, forward first, weights last", alternating, false);
  measure("the published order, backward not split", unsplit, false);
  measure("the published order, as its trace shows it", table, false);
  measure("the published order, as a host launches it", launched, false);
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
    const Timeline timeline = gather(*pipe_comm, tracer->last());
    if (world->rank() != 0 || step == 0) continue;
    const planner::Usage whole = planner::report(timeline).total();
    std::printf("step %7.1f ms, communication %5.1f %% hidden", wall,
                100 * whole.collectives.hidden / whole.collectives.total());
    if (const std::optional<planner::Window> part = planner::main_part(timeline)) {
      const planner::Usage main = planner::report(timeline, *part).total();
      const double time = part->length() * pipe_comm->size();
      std::printf("; main part %7.1f ms: compute %4.1f %%, communication %4.1f %%, of it hidden %6.2f %%",
                  1e3 * part->length(), 100 * main.compute / time, 100 * main.collectives.total() / time,
                  100 * main.collectives.hidden / main.collectives.total());
    }
    std::printf("\n");
    if (step == flags.steps && !flags.trace.empty())
      dualpipe::detail::write_file(flags.trace, planner::to_trace(timeline));
  }
}

/// A collective that is over at once.
struct Nothing final : Collective {
  Launched forward(Tensors inputs, const StageContext&) override {
    Tensors outputs;
    for (const torch::Tensor& input : inputs)
      outputs.push_back(input.detach().set_requires_grad(input.requires_grad()));
    return {join({}, [outputs](std::vector<Tensors>) { return outputs; }), nullptr};
  }
  Pending backward(std::shared_ptr<void>, Tensors gradients) override {
    return join({}, [gradients](std::vector<Tensors>) { return gradients; });
  }
};

/// Time of a micro-batch through stages of tiny nodes, beside the same code as one autograd graph. What is between is
/// the executor's, graphs of their own for each node and the split of their backwards included.
void host_time(const std::shared_ptr<Communicator>& comm, const Flags& flags) {
  const Sleeping module(1);
  const int num_nodes = 4 * flags.layers;
  const auto compute = [module](const Tensors& inputs) { return Tensors{inputs[0] * module->weights[0]}; };
  Stage stage(module.ptr());
  for (int i = 0; i < num_nodes / 2; ++i)
    stage.compute("compute", [compute](const Tensors& inputs, const StageContext&) { return compute(inputs); })
        .communicate("nothing", std::make_shared<Nothing>(), {0});
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = flags.num_micro_batches, .schedule = "1f1b"},
                [&](int) { return stage; });
  Batch batch;
  batch.inputs = {torch::ones({flags.num_micro_batches, 4})};
  batch.targets = {torch::zeros({flags.num_micro_batches, 1})};
  const LossFn loss = [](const Tensors& outputs, const Tensors&) { return outputs[0].mean(); };
  const auto plain = [&] {
    for (int m = 0; m < flags.num_micro_batches; ++m) {
      Tensors tensors{batch.inputs[0].narrow(0, m, 1)};
      for (int i = 0; i < num_nodes / 2; ++i) tensors = compute(tensors);
      (loss(tensors, {}) / flags.num_micro_batches).backward();
    }
  };
  const auto best_of = [&](const auto& body) {
    double best = std::numeric_limits<double>::infinity();
    for (int i = 0; i < 20 * flags.steps; ++i) {
      const auto begin = Clock::now();
      body();
      best = std::min(best, milliseconds_since(begin));
    }
    return 1e3 * best / flags.num_micro_batches;
  };
  const double alone = best_of(plain), executed = best_of([&] { pipe->step(batch, loss); });
  // Computing nodes run forward, input part and weight part, the others forward and backward.
  const double runs = 2.5 * num_nodes;
  std::printf(
      "a micro-batch through %d nodes: %.1f us, as one graph %.1f us; between: %.1f us per node, %.1f us per run of a "
      "node\n",
      num_nodes, executed, alone, (executed - alone) / num_nodes, (executed - alone) / runs);
}

}  // namespace

int main(int argc, char** argv) {
  World world;
  try {
    CLI::App app{"How much of the stages' communication hides under compute"};
    Flags flags;
    app.add_option("--microbatches", flags.num_micro_batches, "micro-batches of a step")->capture_default_str();
    app.add_option("--layers", flags.layers, "layers of a stage")->capture_default_str()->check(CLI::PositiveNumber);
    app.add_option("--weights", flags.weights, "weights of a node, each with its own share of F, I and W")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app.add_option("--attention-ms", flags.attention, "time of each of F, I and W")->capture_default_str();
    app.add_option("--mlp-ms", flags.mlp, "time of each of F, I and W")->capture_default_str();
    app.add_option("--communication-ms", flags.communication, "time of a dispatch or combine")->capture_default_str();
    app.add_option("--steps", flags.steps, "measured steps")->capture_default_str()->check(CLI::PositiveNumber);
    app.add_flag("--pair", flags.pair, "one pair only, on two ranks");
    app.add_flag("--host", flags.host, "what the executor adds to each node, on one rank");
    app.add_option("--trace", flags.trace,
                   "write what rank 0's pipeline did in its last step; with --pair one file per order, numbered")
        ->option_text("FILE");
    CLI11_PARSE(app, argc, argv);

    at::set_num_threads(1);
    sleep_precisely();
    world = World::from_env();
    const auto comm = connect_sockets(world);
    if (flags.host) {
      DUALPIPE_CHECK(comm->size() == 1, "--host is for one rank, there are ", comm->size());
      host_time(comm, flags);
      return 0;
    }
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
