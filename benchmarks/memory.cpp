// What a rank holds of weights, gradients and optimizer states, counted by an allocator, beside what dualpipe-plan says:
// when it has all gradients and has summed none, and between two steps. Ranks are threads. Ends with 1 where the two are
// more than 5 % apart.
//
//   dualpipe-bench-memory
//   dualpipe-bench-memory --ranks 8 --replicas 1 2 4 --schedule dualpipe zbv --dtype float32
#include <c10/core/CPUAllocator.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dualpipe/comm/local.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/pipeline/observer.hpp"
#include "dualpipe/planner/memory.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/train/sharded_optimizer.hpp"

namespace {

using namespace dualpipe;

struct Flags {
  std::vector<std::string> schedules{"dualpipe", "dualpipev"};
  std::vector<int> replicas{1, 2};
  int ranks = 4;
  int width = 192;
  int layers = 24;  // on each rank, of one copy of the model
  std::string dtype = "bfloat16";
};

/// Bytes of tensors that one thread has allocated and nobody has released.
struct Held {
  std::atomic<std::int64_t> now{0}, most{0};

  void add(std::int64_t bytes) {
    const std::int64_t sum = now += bytes;
    std::int64_t before = most;
    while (before < sum && !most.compare_exchange_weak(before, sum)) {
    }
  }
};

thread_local Held* held_by_this_thread = nullptr;

/// Counts for the thread that allocates. Memory is its own context, as raw_allocate() wants it, so blocks are looked up.
class CountingAllocator final : public c10::Allocator {
 public:
  explicit CountingAllocator(c10::Allocator& inner) : inner_(inner) { that_ = this; }

  c10::DataPtr allocate(std::size_t bytes) override {
    c10::DataPtr data = inner_.allocate(bytes);
    void* const memory = data.get();
    if (memory == nullptr) return data;
    Held* const held = held_by_this_thread;
    if (held != nullptr) held->add(static_cast<std::int64_t>(bytes));
    const std::lock_guard lock(mutex_);
    blocks_[memory] = {std::move(data), held, static_cast<std::int64_t>(bytes)};
    return {memory, memory, release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Block {
    c10::DataPtr data;
    Held* held = nullptr;  // null: of no rank
    std::int64_t bytes = 0;
  };
  static void release(void* memory) {
    if (memory == nullptr) return;
    Block block;
    {
      const std::lock_guard lock(that_->mutex_);
      const auto found = that_->blocks_.find(memory);
      block = std::move(found->second);
      that_->blocks_.erase(found);
    }
    if (block.held != nullptr) block.held->add(-block.bytes);
  }

  static inline CountingAllocator* that_ = nullptr;
  c10::Allocator& inner_;
  std::mutex mutex_;
  std::unordered_map<void*, Block> blocks_;
};

/// What the rank holds when it has all its gradients for the first time in a step.
class WithAllGradients : public Observer {
 public:
  WithAllGradients(Tensors parameters, const Held& held) : parameters_(std::move(parameters)), held_(held) {}
  void begin(std::int64_t) override { bytes = 0; }
  void record(const Interval&) override {
    if (bytes == 0 && std::all_of(parameters_.begin(), parameters_.end(),
                                  [](const at::Tensor& parameter) { return parameter.grad().defined(); }))
      bytes = held_.now;
  }
  void end(bool) override {}
  std::int64_t bytes = 0;

 private:
  Tensors parameters_;
  const Held& held_;
};

struct Case {
  std::string kind;
  int replicas;
  bool sharded;
};

/// Of one rank, in bytes.
struct Measured {
  std::int64_t with_all_gradients = 0, between_steps = 0, most = 0;
};

Stage stage_of(int layers, int width, at::ScalarType dtype) {
  torch::nn::Sequential module;
  for (int i = 0; i < layers; ++i)
    module->push_back(torch::nn::Linear(torch::nn::LinearOptions(width, width).bias(false)));
  module->to(dtype);
  return as_stage(module);
}

/// The most that any rank holds.
Measured measure(const Case& each, const Flags& flags, at::ScalarType dtype) {
  Measured all;
  std::mutex mutex;
  const int num_ranks = flags.ranks * each.replicas;
  std::vector<Held> held(num_ranks);
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> world) {
    held_by_this_thread = &held[world->rank()];
    {
      const Held& mine = *held_by_this_thread;
      const int micro_batches = 2 * flags.ranks;
      const Mesh mesh(world, {.pipeline = flags.ranks, .data = each.replicas});
      const at::Tensor x = torch::ones({micro_batches, flags.width}, dtype);
      const Batch batch{.inputs = {x}, .targets = {x}};
      const std::int64_t before = mine.now;
      const DualPipeOptions options{.num_micro_batches = micro_batches,
                                    .schedule = each.kind,
                                    .gradient_dtype = GradientDtype::float32,
                                    .shard_optimizer = each.sharded};
      const int per_rank = make_schedule({each.kind, flags.ranks, micro_batches}).num_stages / flags.ranks;
      DualPipe pipe(mesh, options, [&](int) { return stage_of(flags.layers / per_rank, flags.width, dtype); });
      ShardedOptimizer optimizer(pipe, std::make_unique<torch::optim::AdamW>(pipe->owned_parameters()),
                                 {.master_weights = dtype != at::kFloat});
      const auto observer = std::make_shared<WithAllGradients>(pipe->parameters(), mine);
      pipe->add_observer(observer);
      Measured found;
      for (int step = 0; step < 3; ++step) {  // states exist after the first
        optimizer.zero_grad();
        world->barrier().wait();
        held_by_this_thread->most = mine.now.load();
        pipe->step(batch, torch::nn::MSELoss());
        found.with_all_gradients = observer->bytes - before;
        found.most = mine.most - before;
        optimizer.step();
        world->barrier().wait();
        found.between_steps = mine.now - before;
      }
      const std::lock_guard lock(mutex);
      all.with_all_gradients = std::max(all.with_all_gradients, found.with_all_gradients);
      all.between_steps = std::max(all.between_steps, found.between_steps);
      all.most = std::max(all.most, found.most);
    }
    held_by_this_thread = nullptr;
  });
  return all;
}

/// Bytes of a parameter.
struct Sizes {
  double weight, gradient, optimizer;
  double all() const { return weight + gradient + optimizer; }
};

/// Bytes for each parameter of S, which are those of the model over the ranks of a pipeline.
double predicted(const Case& each, const Flags& flags, const Sizes& sizes, double sharded_bytes) {
  const Schedule schedule = make_schedule({each.kind, flags.ranks, 2 * flags.ranks});
  const double of_stage = sizes.all() * flags.ranks / schedule.num_stages;
  const auto ranks = planner::memory(schedule, {.activation = 0,
                                                .state = of_stage,
                                                .sharded = each.sharded ? sharded_bytes / sizes.all() : 0,
                                                .replicas = each.replicas});
  return ranks[0].state;
}

bool compare(const Flags& flags) {
  const at::ScalarType dtype = flags.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  const Sizes sizes = dtype == at::kFloat ? Sizes{4, 4, 8} : Sizes{2, 4, 12};
  const double parameters = static_cast<double>(flags.layers) * flags.width * flags.width;  // S
  std::printf(
      "%g bytes a parameter: weight %g, gradient %g, AdamW%s %g; %.2f million parameters for each rank of a pipeline\n",
      sizes.all(), sizes.weight, sizes.gradient, dtype == at::kFloat ? "" : " with float32 weights", sizes.optimizer,
      1e-6 * parameters);
  std::printf("%-12s %3s %-8s %28s %28s %9s\n", "", "", "", "with all gradients", "between steps", "at most");
  std::printf("%-12s %3s %-8s %9s %9s %8s %9s %9s %8s %9s\n", "schedule", "D", "states", "predicted", "measured", "",
              "predicted", "measured", "", "measured");
  bool fits = true;
  for (const std::string& kind : flags.schedules)
    for (const int replicas : flags.replicas)
      for (const bool sharded : {false, true}) {
        const Case each{kind, replicas, sharded};
        const Measured found = measure(each, flags, dtype);
        const double within = predicted(each, flags, sizes, sizes.optimizer);
        const double between = predicted(each, flags, sizes, sizes.gradient + sizes.optimizer);
        const double measured_within = static_cast<double>(found.with_all_gradients) / parameters;
        const double measured_between = static_cast<double>(found.between_steps) / parameters;
        const double off_within = measured_within / within - 1, off_between = measured_between / between - 1;
        fits = fits && std::abs(off_within) < 0.05 && std::abs(off_between) < 0.05;
        std::printf("%-12s %3d %-8s %7.2f S %7.2f S %+6.1f %% %7.2f S %7.2f S %+6.1f %% %7.2f S\n", kind.c_str(),
                    replicas, sharded ? "sharded" : "copied", within, measured_within, 100 * off_within, between,
                    measured_between, 100 * off_between, static_cast<double>(found.most) / parameters);
        std::fflush(stdout);
      }
  return fits;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    CLI::App app{"What a rank holds of weights, gradients and optimizer states, with and without a sharded optimizer"};
    Flags flags;
    app.add_option("--schedule", flags.schedules, "kinds")->capture_default_str();
    app.add_option("--replicas", flags.replicas, "pipelines that train one model, one or several numbers")
        ->capture_default_str();
    app.add_option("--ranks", flags.ranks, "of each pipeline")->capture_default_str()->check(CLI::PositiveNumber);
    app.add_option("--width", flags.width, "of the matrices")->capture_default_str()->check(CLI::PositiveNumber);
    app.add_option("--layers", flags.layers, "matrices for each rank of a pipeline")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app.add_option("--dtype", flags.dtype, "of the weights")
        ->capture_default_str()
        ->check(CLI::IsMember({"float32", "bfloat16"}));
    CLI11_PARSE(app, argc, argv);
    at::set_num_threads(1);
    // Never destroyed: LibTorch releases by it what it keeps until the end.
    auto* const allocator = new CountingAllocator(*c10::GetCPUAllocator());
    c10::SetCPUAllocator(allocator, /*priority=*/255);
    return compare(flags) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dualpipe-bench-memory: %s\n", error.what());
    return 1;
  }
}
