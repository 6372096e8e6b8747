#include "trainer.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <map>
#include <numbers>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <variant>

#include "connect.hpp"
#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/files.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/planner/cost_model.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/planner/trace.hpp"
#include "dualpipe/schedule/load.hpp"
#include "dualpipe/train/learning_rate.hpp"
#include "dualpipe/train/metrics.hpp"
#include "dualpipe/train/sharded_optimizer.hpp"
#include "report.hpp"

namespace example {
namespace {

using dualpipe::Batch;
using dualpipe::Tensors;
using dualpipe::Timeline;

dualpipe::MeshShape mesh_shape(const Options& options, int num_ranks) {
  DUALPIPE_CHECK(num_ranks % options.pipelines == 0, num_ranks, num_ranks == 1 ? " rank" : " ranks",
                 " cannot form pipelines of equal length when there are to be ", options.pipelines,
                 "; start a multiple of that, or give another --pipelines");
  DUALPIPE_CHECK(options.pipelines % options.num_sharing == 0, "experts are shared by ", options.num_sharing,
                 " pipelines each, but ", options.pipelines,
                 " pipelines do not divide into such groups; give another --expert-parallel");
  return {.pipeline = num_ranks / options.pipelines, .data = options.pipelines, .expert = options.num_sharing};
}

/// The number of stages that the model must be cut into.
int num_stages(const Options& options, int world_size) {
  const dualpipe::DualPipeOptions& pipe = options.pipe;
  const int num_ranks = mesh_shape(options, world_size).pipeline;
  DUALPIPE_CHECK(pipe.num_ranks == 0 || pipe.num_ranks == num_ranks, "the configuration is for ", pipe.num_ranks,
                 " ranks, ", num_ranks, " were started", options.pipelines > 1 ? " for each pipeline" : "", "; start ",
                 pipe.num_ranks * options.pipelines, " or correct num_ranks");
  const dualpipe::ScheduleSpec spec{pipe.schedule, num_ranks, pipe.num_micro_batches, pipe.chunks_per_rank};
  return dualpipe::load_schedule(spec).num_stages;
}

/// By hand, as Options::partition says.
dualpipe::StageFactory cut_by_hand(std::vector<dualpipe::NamedLayer> layers, const std::vector<std::string>& entries) {
  std::vector<int> counts;
  std::vector<dualpipe::LayerRange> ranges;
  for (const std::string& entry : entries) {
    const std::size_t colon = entry.find(':');
    if (colon != std::string::npos) {
      ranges.push_back({entry.substr(0, colon), entry.substr(colon + 1)});
      continue;
    }
    int& count = counts.emplace_back();
    const char* end = entry.data() + entry.size();
    const auto [last, error] = std::from_chars(entry.data(), end, count);
    DUALPIPE_CHECK(error == std::errc() && last == end, "--partition takes numbers of layers, or FIRST:LAST, got '",
                   entry, "'");
  }
  DUALPIPE_CHECK(counts.empty() || ranges.empty(), "--partition takes numbers of layers, or FIRST:LAST, not both");
  return ranges.empty() ? dualpipe::split(std::move(layers), counts) : dualpipe::split(std::move(layers), ranges);
}

/// As Module::to(dtype), which converts integers too: counters stay exact.
void convert(const torch::nn::Module& module, at::ScalarType dtype) {
  for (const Tensors& tensors : {module.parameters(), module.buffers()})
    for (const torch::Tensor& each : tensors)
      if (each.is_floating_point()) each.set_data(each.to(dtype));
}

dualpipe::StageFactory cut(const Model& model, int num_stages, const Options& options) {
  const int spare = static_cast<int>(model.layers.size()) - options.model.layers;
  DUALPIPE_CHECK(options.model.layers + spare >= num_stages, "schedule ", options.pipe.schedule, " has ", num_stages,
                 " stages here, the model ", options.model.layers,
                 " blocks, an embedding and a head; at least --layers ", num_stages - spare, " is needed");
  std::vector<dualpipe::NamedLayer> layers = model.layers;
  for (dualpipe::NamedLayer& layer : layers)
    layer.make = [make = layer.make, dtype = options.dtype] {
      dualpipe::Stage stage = make();
      convert(*stage.module(), dtype);
      return stage;
    };
  if (!options.partition.empty()) return cut_by_hand(std::move(layers), options.partition);
  return dualpipe::split(std::move(layers), num_stages, model.costs);
}

dualpipe::DualPipeOptions with_buffers(dualpipe::DualPipeOptions options, const Model& model) {
  for (const auto& [name, reduction] : model.buffers) options.buffers.try_emplace(name, reduction);
  return options;
}

/// In nats per byte.
torch::Tensor cross_entropy(const Tensors& outputs, const Tensors& targets) {
  return torch::nn::functional::cross_entropy(outputs[0].flatten(0, 1).to(torch::kFloat), targets[0].flatten());
}

/// Windows of context + 1 bytes: all but the last go in, all but the first are to be predicted.
Batch batch_of(const torch::Tensor& windows, at::Device device) {
  const auto length = windows.size(1) - 1;
  const torch::Tensor there = windows.to(device);
  Batch batch;
  batch.inputs = {there.narrow(1, 0, length)};
  batch.targets = {there.narrow(1, 1, length)};
  return batch;
}

/// Rises to its full value, then falls to a twentieth along half a cosine.
double learning_rate(const Options& options, double progress) {
  const double rise = options.warm_up > 0 ? std::min(1.0, progress / options.warm_up) : 1.0;
  return options.learning_rate * rise * (0.525 + 0.475 * std::cos(std::numbers::pi * progress));
}

std::int64_t draw(const torch::Tensor& logits, double temperature, at::Generator& random) {
  if (temperature <= 0) return logits.argmax().item<std::int64_t>();
  const auto probabilities = torch::softmax(logits.to(torch::kCPU, torch::kDouble) / temperature, 0);
  return torch::multinomial(probabilities, 1, false, random).item<std::int64_t>();
}

std::string printable(const torch::Tensor& bytes) {
  std::string text;
  const torch::Tensor flat = bytes.flatten();
  for (std::int64_t i = 0; i < flat.numel(); ++i) {
    const auto byte = flat[i].item<std::int64_t>();
    text += byte == '\n' || byte == '\t' || (byte >= ' ' && byte <= '~') ? static_cast<char>(byte) : '?';
  }
  return text;
}

/// The same pipeline in each replica of a mesh.
Timeline side_by_side(const Timeline& one, const dualpipe::MeshShape& shape) {
  Timeline all = one;
  all.num_ranks = shape.size();
  all.intervals.clear();
  for (int replica = 0; replica < shape.data; ++replica)
    for (dualpipe::Interval interval : one.intervals) {
      interval.rank = shape.rank_of(interval.rank, replica);
      all.intervals.push_back(std::move(interval));
    }
  return all;
}

}  // namespace

Trainer::Trainer(const dualpipe::World& world, const Options& options, const MakeModel& make_model)
    : world_(world),
      options_(options),
      num_stages_(num_stages(options, world.size)),
      corpus_(
          open_corpus(options.text.empty() ? std::vector{default_text()} : options.text, options.model.context + 1)),
      mesh_(connect(world, options), mesh_shape(options, world.size)),
      model_(make_model(mesh_)),
      pipe_(mesh_, with_buffers(options.pipe, model_), cut(model_, num_stages_, options), model_.is_expert),
      tracer_(std::make_shared<dualpipe::Tracer>(world.rank)) {
  pipe_->add_observer(tracer_);
}

void Trainer::run() {
  introduce();
  const Timeline last_step = train();
  say("held-out loss: %.3f nats per byte\n", held_out_loss());
  if (model_.after_step) report_routing();
  if (options_.sample > 0) sample();
  if (last_step.num_ranks > 0) report(last_step);
}

template <class... Arguments>
void Trainer::say(const char* pattern, const Arguments&... arguments) const {
  if (world_.rank != 0) return;
  if constexpr (sizeof...(arguments) == 0)
    std::fputs(pattern, stdout);
  else
    std::printf(pattern, arguments...);
  std::fflush(stdout);
}

void Trainer::introduce() const {
  const auto& schedule = pipe_->schedule();
  if (mesh_.num_replicas() > 1) say("%d pipelines side by side, each: ", mesh_.num_replicas());
  say("%s on %d ranks, %d stages, %d micro-batches per step\n", schedule.name.c_str(), mesh_.pipeline()->size(),
      schedule.num_stages, schedule.num_micro_batches);
  if (!options_.quiet && world_.rank == 0) say(picture(schedule, options_.pipe.publish).c_str());
  say("model: %s%s%s\n", model_.description.c_str(), options_.dtype == at::kBFloat16 ? " in bfloat16" : "",
      options_.device == at::kCUDA ? ", on GPUs" : "");
  say("text: %d files, %.1f MB to learn from, %.1f MB held out\n", corpus_.num_files,
      1e-6 * static_cast<double>(corpus_.training.size()), 1e-6 * static_cast<double>(corpus_.held_out.size()));
}

std::optional<dualpipe::CheckpointExtra> Trainer::resume(torch::optim::Optimizer& optimizer) {
  if (options_.checkpoint.empty()) return std::nullopt;
  std::error_code ignored;
  const bool empty = agree(std::filesystem::is_directory(options_.checkpoint, ignored) &&
                                   !std::filesystem::is_empty(options_.checkpoint, ignored)
                               ? 0
                               : 1) > 0;
  DUALPIPE_CHECK(empty || options_.resume, options_.checkpoint.string(),
                 " is not empty; add --resume to go on from its last checkpoint, or choose another folder");
  const bool begun = agree(dualpipe::latest_checkpoint(options_.checkpoint) ? 1 : 0) > 0;
  if (!begun) return std::nullopt;
  const dualpipe::CheckpointExtra extra = load_checkpoint(options_.checkpoint, pipe_, optimizer);
  DUALPIPE_CHECK(extra.step < options_.steps, "the run in ", options_.checkpoint.string(), " has done its ", extra.step,
                 " steps; raise --steps, which is ", options_.steps);
  say("goes on after step %lld, from the checkpoint in %s\n", static_cast<long long>(extra.step),
      options_.checkpoint.c_str());
  return extra;
}

Timeline Trainer::train() {
  using Clock = std::chrono::steady_clock;
  const double budget = 60 * options_.minutes;
  dualpipe::ShardedOptimizer sharded(
      pipe_,
      std::make_unique<torch::optim::AdamW>(
          pipe_->owned_parameters(),
          torch::optim::AdamWOptions(options_.learning_rate).betas({0.9, 0.95}).weight_decay(options_.weight_decay)));
  torch::optim::Optimizer& optimizer = sharded.optimizer();

  const dualpipe::LossFn loss = [&](const Tensors& outputs, const Tensors& targets) {
    torch::Tensor value = cross_entropy(outputs, targets);
    if (model_.penalty) {
      const torch::Tensor penalty = model_.penalty(outputs);
      penalty_ += penalty.detach();
      value = value + penalty;
    }
    return value;
  };

  int first = 0;
  double before = 0;  // seconds that an earlier part of the run took
  if (const auto resumed = resume(optimizer)) {
    first = static_cast<int>(resumed->step);
    before = std::get<double>(resumed->values.at("seconds"));
  } else {
    say("held-out loss before training: %.2f nats per byte\n", held_out_loss());
  }
  const auto start = Clock::now();
  const auto elapsed = [&] { return before + std::chrono::duration<double>(Clock::now() - start).count(); };
  std::optional<dualpipe::CheckpointWriter> writer;
  if (!options_.checkpoint.empty())
    writer.emplace(options_.checkpoint, dualpipe::CheckpointOptions{.keep = 2, .asynchronous = true});
  std::optional<dualpipe::MetricsWriter> metrics;
  if (!options_.metrics.empty() && world_.rank == 0) metrics.emplace(options_.metrics, first > 0 ? first : -1);

  Timeline measured;
  Progress progress_line(options_.progress);
  for (int step = first; step < options_.steps; ++step) {
    const double began = elapsed();
    const double progress =
        agree(std::max(static_cast<double>(step + 1) / options_.steps, budget > 0 ? began / budget : 0.0));
    if (progress > 1) break;
    const double rate = learning_rate(options_, progress);
    dualpipe::set_learning_rate(optimizer, rate);
    optimizer.zero_grad();
    const Batch batch = needs_data()
                            ? batch_of(random_windows(corpus_.training, mesh_.replica() * sequences(), sequences(),
                                                      options_.model.context + 1,
                                                      options_.seed * 1'000'003 + static_cast<std::uint64_t>(step)),
                                       device())
                            : Batch{};
    penalty_ = torch::zeros({}, device());
    const dualpipe::StepResult result = pipe_->step(batch, loss);
    measured = trace();
    const double norm = options_.clip > 0 ? pipe_->clip_grad_norm_(options_.clip).item<double>() : NAN;
    sharded.step();
    if (model_.after_step) {
      last_routing_ = model_.after_step(*pipe_);
      if (step == first) first_routing_ = last_routing_;
    }
    const auto [mean, penalty] = loss_and_penalty(result);
    const double now = elapsed();
    const double tokens = static_cast<double>(mesh_.num_replicas() * sequences() * options_.model.context);
    if (metrics)
      metrics->write({.step = step + 1,
                      .loss = mean,
                      .learning_rate = rate,
                      .gradient_norm = norm,
                      .tokens_per_second = tokens / (now - began)});
    if (writer && ((step + 1) % options_.checkpoint_every == 0 || step + 1 == options_.steps))
      writer->save(pipe_, optimizer, {.step = step + 1, .values = {{"seconds", agree(now)}}});
    if (options_.quiet || world_.rank != 0) continue;
    const double left = std::min(now / (step + 1) * (options_.steps - step - 1), budget > 0 ? budget - now : HUGE_VAL);
    progress_line.show(format("step %d  loss %.3f", step + 1, mean) +
                       (model_.penalty ? format("  %s %.4f", model_.penalty_name.c_str(), penalty) : "") +
                       format("  %.0f tokens/s  bubble %.0f %%  %s left", tokens / (now - began),
                              100 * bubble_share(dualpipe::planner::report(measured)), minutes(left).c_str()));
  }
  progress_line.finish();
  if (writer) writer->wait();
  return measured;
}

std::pair<double, double> Trainer::loss_and_penalty(const dualpipe::StepResult& result) {
  // All ranks know the loss, the penalties lie where the last stage ran.
  const torch::Tensor sum = torch::full({1}, penalty_.item<double>(), torch::dtype(torch::kDouble).device(device()));
  mesh_.world()->all_reduce({sum}).wait();
  const double penalty = sum.item<double>() / static_cast<double>(result.losses.numel());
  return {result.losses.mean().item<double>() - penalty, penalty};
}

/// Of all pipelines' last step, by rank of the world.
Timeline Trainer::trace() const {
  Timeline mine = tracer_->last();
  for (dualpipe::Interval& interval : mine.intervals) interval.rank = world_.rank;
  return gather(*mesh_.world(), mine);
}

/// Rank 0's value on every rank: clocks differ, decisions must not.
double Trainer::agree(double value) const {
  const torch::Tensor shared = torch::full({1}, value, torch::dtype(torch::kDouble).device(device()));
  mesh_.world()->broadcast({shared}, 0).wait();
  return shared.item<double>();
}

double Trainer::held_out_loss() {
  const std::int64_t count = sequences() * options_.held_out;
  const Batch batch = needs_data() ? batch_of(spread_windows(corpus_.held_out, mesh_.replica() * count, count,
                                                             mesh_.num_replicas() * count, options_.model.context + 1),
                                              device())
                                   : Batch{};
  pipe_->eval();
  const double loss = pipe_->evaluate(batch, cross_entropy).losses.mean().item<double>();
  pipe_->train();
  return loss;
}

/// One byte after the other: a rank that has the logits draws it, all append it to what they feed next.
void Trainer::sample() {
  const int source = mesh_.shape().rank_of(dualpipe::holders(pipe_->schedule(), num_stages_ - 1).front(), 0);
  at::Generator random = at::detail::createCPUGenerator(options_.seed);
  torch::Tensor text = prompt();
  const auto prompt_length = text.size(1);
  pipe_->eval();
  for (int i = 0; i < options_.sample; ++i) {
    const auto seen = std::min<std::int64_t>(text.size(1), options_.model.context);
    Batch batch;
    batch.inputs = {text.narrow(1, text.size(1) - seen, seen).to(device())};
    const Tensors outputs = pipe_->predict(Batch::from_micro_batches({batch}));
    const torch::Tensor byte = torch::zeros({1, 1}, torch::dtype(torch::kInt64).device(device()));
    if (world_.rank == source) byte.fill_(draw(outputs[0][0][-1], options_.temperature, random));
    mesh_.world()->broadcast({byte}, source).wait();
    text = torch::cat({text, byte.cpu()}, 1);
  }
  pipe_->train();
  say("sample, after the prompt \"%s\":\n", printable(text.narrow(1, 0, prompt_length)).c_str());
  say("%s\n", printable(text.narrow(1, prompt_length, options_.sample)).c_str());
}

/// int64 [1, bytes], at least one byte.
torch::Tensor Trainer::prompt() const {
  torch::Tensor bytes;
  if (options_.prompt && !options_.prompt->empty())
    bytes = torch::tensor(std::vector<std::uint8_t>(options_.prompt->begin(), options_.prompt->end()));
  else
    bytes = corpus_.held_out.read(0, std::min<std::int64_t>(32, options_.model.context));
  return bytes.to(torch::kInt64).unsqueeze(0);
}

void Trainer::report_routing() const {
  // Holders of a stage have the same.
  std::string mine;
  for (const auto& [router, last] : last_routing_)
    mine += router + '\n' + routing_table(router, first_routing_.at(router), last) + '\f';
  std::map<std::pair<std::size_t, std::string>, std::string> tables;  // block2 before block10
  for (const std::string& text : dualpipe::detail::all_gather_text(*mesh_.world(), mine)) {
    std::istringstream parts(text);
    for (std::string router, table; std::getline(parts, router) && std::getline(parts, table, '\f');)
      tables[{router.size(), router}] = table;
  }
  if (tables.empty()) return;
  say("Bytes that went to each expert; the busiest, as a multiple of an equal share; and how often each bias was "
      "raised in all:\n");
  for (const auto& [router, table] : tables) say("%s", table.c_str());
}

void Trainer::report(Timeline measured) const {
  if (world_.rank != 0) return;
  const dualpipe::Costs costs = dualpipe::planner::measure_costs(measured).costs;
  Timeline predicted = side_by_side(simulate(pipe_->schedule(), costs, options_.pipe.publish).timeline, mesh_.shape());
  predicted.name = "predicted";
  predicted.seconds_per_unit = measured.seconds_per_unit;
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  const int sharing = options_.device == at::kCPU ? world_.local_size : 0;
  say("%s", comparison(predicted, measured, costs, sharing, cores).c_str());
  say("%s", overlap(measured).c_str());
  if (!options_.trace.empty()) {
    dualpipe::detail::write_file(options_.trace, dualpipe::planner::to_trace(measured));
    say("trace of the last step, for chrome://tracing and ui.perfetto.dev: %s\n", options_.trace.c_str());
  }
  if (!options_.svg.empty()) {
    measured.name = "measured";
    dualpipe::detail::write_file(options_.svg, dualpipe::planner::to_svg({predicted, measured}));
    say("picture of the last step, predicted above measured: %s\n", options_.svg.c_str());
  }
}

int run_program(
    int argc, const char* const* argv,
    const std::function<std::optional<Program>(int argc, const char* const* argv, std::string& help)>& parse) {
  dualpipe::World world;
  try {
    world = dualpipe::World::from_env();
    std::string help;
    const auto program = parse(argc, argv, help);
    if (!program) {
      if (world.rank == 0) std::fputs(help.c_str(), stdout);
      return 0;
    }
    become_gpu_program(program->options, argv);
    prepare_folder(program->options.trace);
    prepare_folder(program->options.svg);
    prepare_folder(program->options.metrics);
    at::set_num_threads(1);  // ranks are the parallelism; there are usually more of them than cores
    Trainer(world, program->options, program->make_model).run();
    return 0;
  } catch (const std::exception& error) {
    dualpipe::report_failure(world, error);
    return 1;
  }
}

}  // namespace example
