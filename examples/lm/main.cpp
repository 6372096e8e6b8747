// Trains a byte-level language model with DualPipe, one process per rank. See `dualpipe-lm --help`.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <numbers>
#include <string>
#include <thread>

#include "corpus.hpp"
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/dual_pipe.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/launch/world.hpp"
#include "dualpipe/runtime/tracer.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/render.hpp"
#include "model.hpp"
#include "options.hpp"
#include "report.hpp"

namespace {

using dualpipe::Batch;
using dualpipe::Tensors;
using dualpipe::Timeline;
using lm::Options;

/// The number of stages that the model must be cut into.
int num_stages(const dualpipe::DualPipeOptions& options, int num_ranks) {
  DUALPIPE_CHECK(options.num_ranks == 0 || options.num_ranks == num_ranks, "the configuration is for ",
                 options.num_ranks, " ranks, ", num_ranks, " were started; start ", options.num_ranks,
                 " or correct num_ranks");
  const auto& kinds = dualpipe::schedule_kinds();
  if (std::find(kinds.begin(), kinds.end(), options.schedule) != kinds.end())
    return dualpipe::make_schedule({options.schedule, num_ranks, options.num_micro_batches, options.chunks_per_rank})
        .num_stages;
  std::ifstream file(options.schedule, std::ios::binary);
  DUALPIPE_CHECK(file, "--schedule ", options.schedule,
                 " is neither a kind nor a file that can be read; --help lists the kinds");
  return dualpipe::from_csv(std::string(std::istreambuf_iterator<char>(file), {}), options.schedule).num_stages;
}

/// In nats per byte.
torch::Tensor loss_of(const Tensors& outputs, const Tensors& targets) {
  return torch::nn::functional::cross_entropy(outputs[0].flatten(0, 1), targets[0].flatten());
}

/// Windows of context + 1 bytes: all but the last go in, all but the first are to be predicted.
Batch batch_of(const torch::Tensor& windows) {
  const auto length = windows.size(1) - 1;
  Batch batch;
  batch.inputs = {windows.narrow(1, 0, length)};
  batch.targets = {windows.narrow(1, 1, length)};
  return batch;
}

class Session {
 public:
  Session(const dualpipe::World& world, const Options& options)
      : world_(world),
        options_(options),
        corpus_(lm::open_corpus(options.text.empty() ? std::vector{lm::default_text()} : options.text,
                                options.model.context + 1)),
        factory_(cut(num_stages(options.pipe, world.size))),
        communicator_(dualpipe::connect_sockets(world)),
        pipe_(communicator_, options.pipe, factory_),
        tracer_(std::make_shared<dualpipe::Tracer>(world.rank)) {
    pipe_->add_observer(tracer_);
  }

  void run() {
    introduce();
    say("held-out loss before training: %.2f nats per byte\n", held_out_loss());
    const Timeline last_step = train();
    say("held-out loss: %.3f nats per byte\n", held_out_loss());
    if (options_.sample > 0) sample();
    report(last_step);
  }

 private:
  dualpipe::StageFactory cut(int stages) const {
    DUALPIPE_CHECK(options_.model.layers + 2 >= stages, "schedule ", options_.pipe.schedule, " on ", world_.size,
                   " ranks has ", stages, " stages, the model ", options_.model.layers,
                   " blocks, an embedding and a head; at least --layers ", stages - 2, " is needed");
    return dualpipe::split(lm::layers_of(options_.model, options_.seed), stages, lm::layer_costs(options_.model));
  }

  /// As printf, on rank 0 alone.
  template <class... Arguments>
  void say(const char* pattern, const Arguments&... arguments) const {
    if (world_.rank != 0) return;
    if constexpr (sizeof...(arguments) == 0)
      std::fputs(pattern, stdout);
    else
      std::printf(pattern, arguments...);
    std::fflush(stdout);
  }

  bool needs_data() const { return pipe_->feeds_inputs() || pipe_->computes_loss(); }
  std::int64_t sequences() const { return std::int64_t{options_.pipe.num_micro_batches} * options_.batch; }

  void introduce() const {
    const auto& schedule = pipe_->schedule();
    say("%s on %d ranks, %d stages, %d micro-batches per step\n", schedule.name.c_str(), world_.size,
        schedule.num_stages, schedule.num_micro_batches);
    if (!options_.quiet && world_.rank == 0) say(lm::picture(schedule, options_.pipe.publish).c_str());
    const lm::ModelSize& size = options_.model;
    say("model: %d blocks, width %d, %d heads, context %d, %.2f million parameters\n", size.layers, size.width,
        size.heads, size.context, 1e-6 * static_cast<double>(lm::parameter_count(size)));
    say("text: %d files, %.1f MB to learn from, %.1f MB held out\n", corpus_.num_files,
        1e-6 * static_cast<double>(corpus_.training.size()), 1e-6 * static_cast<double>(corpus_.held_out.size()));
  }

  Timeline train() {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
    const double budget = 60 * options_.minutes;
    torch::optim::AdamW optimizer(
        pipe_->parameters(),
        torch::optim::AdamWOptions(options_.learning_rate).betas({0.9, 0.95}).weight_decay(options_.weight_decay));

    Timeline measured;
    for (int step = 0; step < options_.steps; ++step) {
      const double began = elapsed();
      const double progress =
          agree(std::max(static_cast<double>(step + 1) / options_.steps, budget > 0 ? began / budget : 0.0));
      if (progress > 1) break;
      set_learning_rate(optimizer, progress);
      optimizer.zero_grad();
      const Batch batch =
          needs_data() ? batch_of(lm::random_windows(corpus_.training, sequences(), options_.model.context + 1,
                                                     options_.seed * 1'000'003 + static_cast<std::uint64_t>(step)))
                       : Batch{};
      const dualpipe::StepResult result = pipe_->step(batch, loss_of);
      measured = gather(*communicator_, tracer_->last());
      if (options_.clip > 0) pipe_->clip_grad_norm_(options_.clip);
      optimizer.step();
      if (options_.quiet || world_.rank != 0) continue;
      const double now = elapsed();
      const double left =
          std::min(now / (step + 1) * (options_.steps - step - 1), budget > 0 ? budget - now : HUGE_VAL);
      say("step %d  loss %.3f  %.0f tokens/s  bubble %.0f %%  %s left\n", step + 1, result.losses.mean().item<double>(),
          static_cast<double>(sequences() * options_.model.context) / (now - began),
          100 * lm::bubble_share(dualpipe::report(measured)), lm::minutes(left).c_str());
    }
    return measured;
  }

  /// Rank 0's value on every rank: clocks differ, decisions must not.
  double agree(double value) const {
    const torch::Tensor shared = torch::full({1}, value, torch::kDouble);
    communicator_->broadcast({shared}, 0).wait();
    return shared.item<double>();
  }

  /// Rises to its full value, then falls to a twentieth along half a cosine.
  void set_learning_rate(torch::optim::AdamW& optimizer, double progress) const {
    const double rise = options_.warm_up > 0 ? std::min(1.0, progress / options_.warm_up) : 1.0;
    const double fall = 0.525 + 0.475 * std::cos(std::numbers::pi * progress);
    for (auto& group : optimizer.param_groups()) group.options().set_lr(options_.learning_rate * rise * fall);
  }

  double held_out_loss() {
    const Batch batch = needs_data() ? batch_of(lm::spread_windows(corpus_.held_out, sequences() * options_.held_out,
                                                                   options_.model.context + 1))
                                     : Batch{};
    pipe_->eval();
    const double loss = pipe_->evaluate(batch, loss_of).losses.mean().item<double>();
    pipe_->train();
    return loss;
  }

  /// One byte after the other: a rank that has the logits draws it, all append it to what they feed next.
  void sample() {
    const int source = dualpipe::holders(pipe_->schedule(), pipe_->schedule().num_stages - 1).front();
    at::Generator random = at::detail::createCPUGenerator(options_.seed);
    torch::Tensor text = prompt();
    const auto prompt_length = text.size(1);
    pipe_->eval();
    for (int i = 0; i < options_.sample; ++i) {
      const auto seen = std::min<std::int64_t>(text.size(1), options_.model.context);
      Batch batch;
      batch.inputs = {text.narrow(1, text.size(1) - seen, seen)};
      const Tensors outputs = pipe_->predict(Batch::from_micro_batches({batch}));
      const torch::Tensor byte = torch::zeros({1, 1}, torch::kInt64);
      if (world_.rank == source) byte.fill_(draw(outputs[0][0][-1], random));
      communicator_->broadcast({byte}, source).wait();
      text = torch::cat({text, byte}, 1);
    }
    pipe_->train();
    say("sample, after the prompt \"%s\":\n", printable(text.narrow(1, 0, prompt_length)).c_str());
    say("%s\n", printable(text.narrow(1, prompt_length, options_.sample)).c_str());
  }

  torch::Tensor draw(const torch::Tensor& logits, at::Generator& random) const {
    if (options_.temperature <= 0) return logits.argmax();
    return torch::multinomial(torch::softmax(logits.to(torch::kDouble) / options_.temperature, 0), 1, false, random)
        .squeeze();
  }

  /// int64 [1, bytes], at least one byte.
  torch::Tensor prompt() const {
    torch::Tensor bytes;
    if (options_.prompt && !options_.prompt->empty())
      bytes = torch::tensor(std::vector<std::uint8_t>(options_.prompt->begin(), options_.prompt->end()));
    else
      bytes = corpus_.held_out.read(0, std::min<std::int64_t>(32, options_.model.context));
    return bytes.to(torch::kInt64).unsqueeze(0);
  }

  static std::string printable(const torch::Tensor& bytes) {
    std::string text;
    const torch::Tensor flat = bytes.flatten();
    for (std::int64_t i = 0; i < flat.numel(); ++i) {
      const auto byte = flat[i].item<std::int64_t>();
      text += byte == '\n' || byte == '\t' || (byte >= ' ' && byte <= '~') ? static_cast<char>(byte) : '?';
    }
    return text;
  }

  void report(Timeline measured) const {
    if (world_.rank != 0) return;
    const dualpipe::Costs costs = lm::mean_costs(measured);
    Timeline predicted = simulate(pipe_->schedule(), costs, options_.pipe.publish).timeline;
    predicted.name = "predicted";
    predicted.seconds_per_unit = measured.seconds_per_unit;
    const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
    say("%s", lm::comparison(predicted, measured, costs, world_.local_size, cores).c_str());
    if (!options_.trace.empty()) {
      lm::write_file(options_.trace, dualpipe::to_trace(measured));
      say("trace of the last step, for chrome://tracing and ui.perfetto.dev: %s\n", options_.trace.c_str());
    }
    if (!options_.svg.empty()) {
      measured.name = "measured";
      lm::write_file(options_.svg, dualpipe::to_svg({predicted, measured}));
      say("picture of the last step, predicted above measured: %s\n", options_.svg.c_str());
    }
  }

  dualpipe::World world_;
  Options options_;
  lm::Corpus corpus_;
  dualpipe::StageFactory factory_;
  std::shared_ptr<dualpipe::Communicator> communicator_;
  dualpipe::DualPipe pipe_;
  std::shared_ptr<dualpipe::Tracer> tracer_;
};

}  // namespace

int main(int argc, char** argv) {
  dualpipe::World world;
  try {
    world = dualpipe::World::from_env();
    std::string help;
    const auto options = lm::parse(argc, argv, help);
    if (!options) {
      if (world.rank == 0) std::fputs(help.c_str(), stdout);
      return 0;
    }
    lm::prepare_folder(options->trace);
    lm::prepare_folder(options->svg);
    at::set_num_threads(1);  // ranks are the parallelism; there are usually more of them than cores
    Session(world, *options).run();
    return 0;
  } catch (const std::exception& error) {
    dualpipe::report_failure(world, error);
    return 1;
  }
}
