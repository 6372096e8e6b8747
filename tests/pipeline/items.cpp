#include "pipeline/items.hpp"

#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>

#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/train/deferred_batch_norm.hpp"
#include "dualpipe/train/grad_scaler.hpp"
#include "dualpipe/train/master_weights.hpp"
#include "pipeline/noisy.hpp"
#include "pipeline/tied.hpp"

namespace dualpipe::test {
namespace {

Schedule schedule_of(const Layout& layout) {
  return make_schedule({.kind = layout.kind, .num_ranks = layout.mesh.pipeline, .num_micro_batches = kMicroBatches});
}
int stages_of(const Layout& layout) { return schedule_of(layout).num_stages; }
int stages_of(const Mesh& mesh, const std::string& kind) { return stages_of({kind, mesh.shape()}); }

DualPipeOptions options_of(const std::string& kind) { return {.num_micro_batches = kMicroBatches, .schedule = kind}; }

/// Each stage is held once, and its gradients are added up in the order of the micro-batches.
bool one_order(const Layout& layout) {
  return layout.mesh.data == 1 && (layout.kind == "1f1b" || layout.kind == "zb1p" || layout.kind == "interleaved");
}

/// The micro-batches of all replicas, whose batches `batch_of` gives.
template <class BatchOf>
std::vector<Batch> parts_of_all(const Layout& layout, const BatchOf& batch_of) {
  std::vector<Batch> all;
  for (int replica = 0; replica < layout.mesh.data; ++replica) {
    const Batch batch = batch_of(replica);
    const int count = batch.micro_batches.empty() ? kMicroBatches : static_cast<int>(batch.micro_batches.size());
    for (Batch& part : split_batch(batch, count, 0)) all.push_back(std::move(part));
  }
  return all;
}

std::vector<Piece> pieces_of(const Model& model, int num_stages) {
  std::vector<Piece> pieces;
  for (int s = 0; s < num_stages; ++s) pieces.push_back(model(s));
  return pieces;
}

/// The mean of the micro-batches' losses, whose gradients are added to those of the pieces.
double train(std::vector<Piece>& pieces, const std::vector<Batch>& parts, const LossFn& loss, double scale) {
  double sum = 0;
  for (const Batch& part : parts) {
    Tensors tensors = part.inputs;
    for (Piece& piece : pieces) tensors = piece.forward(tensors);
    const at::Tensor value = loss(tensors, part.targets);
    (value * scale).backward();
    sum += value.item<double>();
  }
  return sum / static_cast<double>(parts.size());
}
double train(std::vector<Piece>& pieces, const std::vector<Batch>& parts, const LossFn& loss) {
  return train(pieces, parts, loss, 1.0 / static_cast<double>(parts.size()));
}

at::Tensor number(double value) { return torch::tensor(value, f64()); }

/// Calls `each(name, parameter)` with names as the pipeline has them.
template <class Each>
void for_each_parameter(const std::vector<Piece>& pieces, const Each& each) {
  for (std::size_t s = 0; s < pieces.size(); ++s)
    for (const auto& item : pieces[s].module->named_parameters())
      each("stage" + std::to_string(s) + "." + item.key(), item.value());
}
void add_gradients(Truth& truth, const std::string& when, const std::vector<Piece>& pieces) {
  for_each_parameter(pieces, [&](const std::string& name, const at::Tensor& parameter) {
    truth[when + ": gradient of " + name] = {parameter.grad().clone()};
  });
}
void add_gradients(Found& found, const std::string& when, DualPipe& pipe) {
  for (const auto& item : pipe->named_parameters())
    found[when + ": gradient of " + item.key()] = item.value().grad().clone();
}
void zero_grad(const std::vector<Piece>& pieces) {
  for (const Piece& piece : pieces) piece.module->zero_grad();
}
Tensors parameters_of(const std::vector<Piece>& pieces) {
  Tensors all;
  for (const Piece& piece : pieces)
    for (const at::Tensor& parameter : piece.module->parameters()) all.push_back(parameter);
  return all;
}

// --- weights of losses, metrics, losses of several stages; other numbers of micro-batches, some of them uneven

/// A layer, and the losses that it adds: two in the second stage, one in the last. Rows of zeros have an infinite
/// derivative in the second. Every second stage is computed again.
at::Tensor balanced_layer(Layer& module, int number, int num_stages, const at::Tensor& x, Tensors& added) {
  at::Tensor y = module->forward(number == 1 ? torch::sqrt(x.pow(2)) : x);
  if (number == 0) y = y * x.ne(0);
  if (number == 1 || number == num_stages - 1) added.push_back(0.1 * y.pow(2).mean());
  if (number == 1) added.push_back(0.01 * y.mean().to(torch::kFloat));
  return y;
}

Stage balanced_stage(int number, int num_stages) {
  Layer module(number);
  return Stage(module.ptr())
      .recompute(number % 2 == 1)
      .compute("layer", [=](const Tensors& x, const StageContext& context) mutable {
        Tensors added;
        const at::Tensor y = balanced_layer(module, number, num_stages, x[0], added);
        for (const at::Tensor& loss : added) context.add_loss(loss);
        return Tensors{y};
      });
}

/// The mean over the rows that count, NaN where none does; and behind it how many count, and how many are positive.
LossFn masked_loss() {
  return [](const Tensors& outputs, const Tensors& targets) {
    const at::Tensor count = targets[1].sum();
    const at::Tensor each = (outputs[0] - targets[0]).pow(2).mean(1);
    return std::tuple((each * targets[1]).sum() / count, count.to(torch::kLong), outputs[0].gt(0).sum());
  };
}

/// Two of three rows count. With `empty`, rows 2 and 3 are zeros, and do not.
Batch masked_batch(int rows, std::uint64_t seed, bool empty) {
  Batch batch = random_batch(rows, seed);
  at::Tensor mask = torch::arange(rows).remainder(3).ne(1).to(torch::kDouble);
  if (empty) {
    mask.slice(0, 2, 4).zero_();
    batch.inputs[0].slice(0, 2, 4).zero_();
  }
  batch.targets.push_back(mask);
  return batch;
}

/// By the rows that count.
std::vector<double> weights_of(const std::vector<Batch>& micro_batches) {
  std::vector<double> weights;
  for (const Batch& each : micro_batches) weights.push_back(each.targets[1].sum().item<double>());
  return weights;
}

struct WeightedTruth {
  double loss = 0;
  std::vector<double> losses;
  at::Tensor metrics, added_losses;
  std::map<int, std::map<std::string, at::Tensor>> gradients;
};

/// @param micro_batches  of all replicas.
WeightedTruth weighted_truth(int num_stages, const std::vector<Batch>& micro_batches,
                             const std::vector<double>& weights) {
  WeightedTruth truth;
  truth.metrics = torch::zeros({2}, f64());
  truth.added_losses = torch::zeros({num_stages}, f64());
  std::vector<Layer> model;
  for (int s = 0; s < num_stages; ++s) model.emplace_back(s);
  const double all = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (std::size_t m = 0; m < micro_batches.size(); ++m) {
    Tensors x = micro_batches[m].inputs;
    at::Tensor total;
    for (int s = 0; s < num_stages; ++s) {
      Tensors added;
      x = {balanced_layer(model[s], s, num_stages, x[0], added)};
      for (const at::Tensor& loss : added) {
        if (weights[m] == 0) continue;
        truth.added_losses[s] += loss.detach().to(torch::kDouble) * weights[m] / all;
        total = total.defined() ? total + loss : loss;
      }
    }
    const Tensors values = masked_loss().values(x, micro_batches[m].targets);
    truth.losses.push_back(values[0].item<double>());
    truth.metrics += torch::stack({values[1].to(torch::kDouble), values[2].to(torch::kDouble)});
    if (weights[m] == 0) continue;
    truth.loss += values[0].item<double>() * weights[m] / all;
    ((values[0] + total) * (weights[m] / all)).backward();
  }
  for (int s = 0; s < num_stages; ++s)
    for (const auto& item : model[s]->named_parameters()) truth.gradients[s][item.key()] = item.value().grad().clone();
  return truth;
}

Batch counted_batch(int count, int replica) {
  const bool whole = count == kMicroBatches;
  Batch batch = masked_batch(whole ? 2 * count : 3 * count - (count > 1), 10 + replica, /*empty=*/whole);
  if (!whole) batch = batch.chunk(count);
  batch.weights = weights_of(split_batch(batch, count, 0));
  return batch;
}

/// Losses of micro-batches of weight 0 are NaN.
at::Tensor comparable(const at::Tensor& losses) { return torch::nan_to_num(losses, 1000); }

Truth counted_truth(const Layout& layout, const std::vector<int>& counts) {
  Truth all;
  for (const int count : counts) {
    const std::vector<Batch> parts = parts_of_all(layout, [&](int replica) { return counted_batch(count, replica); });
    const WeightedTruth truth = weighted_truth(stages_of(layout), parts, weights_of(parts));
    for (const char* call : {"step", "evaluation"}) {
      const std::string when = call + (" of " + std::to_string(count));
      all[when + ": loss"] = {number(truth.loss)};
      all[when + ": losses"] = {comparable(torch::tensor(truth.losses, f64()))};
      all[when + ": metrics"] = {truth.metrics, 0};
      all[when + ": added losses"] = {truth.added_losses};
    }
    for (const auto& [stage, gradients] : truth.gradients)
      for (const auto& [name, gradient] : gradients)
        all["step of " + std::to_string(count) + ": gradient of stage" + std::to_string(stage) + "." + name] = {
            gradient};
  }
  return all;
}

Found counted_run(const Mesh& mesh, const std::string& kind, const std::vector<int>& counts) {
  const int num_stages = stages_of(mesh, kind);
  DualPipe pipe(mesh, options_of(kind), [&](int number) { return balanced_stage(number, num_stages); });
  Found found;
  const auto add = [&](const std::string& when, const StepResult& result) {
    found[when + ": loss"] = result.loss;
    found[when + ": losses"] = comparable(result.losses);
    found[when + ": metrics"] = result.metrics;
    found[when + ": added losses"] = result.added_losses;
  };
  for (const int count : counts) {
    Batch batch = counted_batch(count, mesh.replica());
    if (!pipe->computes_loss()) batch.weights.clear();  // these ranks hear them
    const std::string of = " of " + std::to_string(count);
    pipe->zero_grad();
    add("step" + of, pipe->step(batch, masked_loss()));
    add_gradients(found, "step" + of, pipe);
    add("evaluation" + of, pipe->evaluate(batch, masked_loss()));
  }
  return found;
}

Item counted(const std::string& name, const std::vector<int>& counts) {
  return {name, [=](const Layout& layout) { return counted_truth(layout, counts); },
          [=](const Mesh& mesh, const std::string& kind) { return counted_run(mesh, kind, counts); }};
}

// --- data where it is

Batch plain_batch(int replica, int step = 0) { return random_batch(2 * kMicroBatches, 40 + 10 * step + replica); }

std::string of_replica(int replica) { return " of replica " + std::to_string(replica); }

Truth data_truth(const Layout& layout) {
  std::vector<Piece> pieces = pieces_of(layer, stages_of(layout));
  Truth truth;
  const double loss =
      train(pieces, parts_of_all(layout, [](int replica) { return plain_batch(replica); }), squared_error());
  for (const std::string when : {"passed", "sent"}) {
    truth[when + ": loss"] = {number(loss)};
    add_gradients(truth, when, pieces);
  }
  for (int replica = 0; replica < layout.mesh.data; ++replica) {
    Tensors x = plain_batch(replica).inputs;
    for (Piece& piece : pieces) x = piece.forward(x);
    truth["prediction" + of_replica(replica)] = {x[0].detach()};
  }
  return truth;
}

Found data_run(const Mesh& mesh, const std::string& kind) {
  DualPipe pipe(mesh, options_of(kind), as_factory(layer));
  const Batch whole = plain_batch(mesh.replica());
  Batch mine;
  if (pipe->feeds_inputs()) mine.inputs = whole.inputs;
  if (pipe->computes_loss()) mine.targets = whole.targets;
  Found found;
  for (const std::string when : {"passed", "sent"}) {
    if (when == "sent") mine = pipe->broadcast_batch(mesh.pipeline()->rank() == 0 ? whole : Batch{});
    pipe->zero_grad();
    found[when + ": loss"] = pipe->step(mine, squared_error()).loss;
    add_gradients(found, when, pipe);
  }
  found["prediction" + of_replica(mesh.replica())] = pipe->predict({.inputs = mine.inputs}, /*everywhere=*/true).at(0);
  return found;
}

// --- precision

Model layers_in(at::ScalarType dtype) {
  return [dtype](int stage) {
    Piece piece = layer(stage);
    piece.module->to(dtype);
    return piece;
  };
}

Batch batch_in(at::ScalarType dtype, int replica, int step) {
  Batch batch = plain_batch(replica, step);
  batch.inputs[0] = batch.inputs[0].to(dtype);
  batch.targets[0] = batch.targets[0].to(at::kFloat);
  if (step == 1) batch.targets[0][2 * 5].fill_(std::numeric_limits<double>::quiet_NaN());
  return batch;
}

/// So small that its gradients need a scale in float16.
LossFn small_loss(double factor) {
  return [factor](const at::Tensor& output, const at::Tensor& target) {
    return torch::mse_loss(output.to(at::kFloat), target) * factor;
  };
}

/// Gradients that are added up in float32.
Tensors sums_of(std::vector<Piece>& pieces, const std::vector<Batch>& parts, const LossFn& loss, double scale) {
  const Tensors parameters = parameters_of(pieces);
  Tensors sums(parameters.size());
  for (const Batch& part : parts) {
    train(pieces, {part}, loss, scale / static_cast<double>(parts.size()));
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const at::Tensor gradient = parameters[i].grad().to(at::kFloat);
      sums[i] = sums[i].defined() ? sums[i] + gradient : gradient;
      parameters[i].mutable_grad().reset();
    }
  }
  return sums;
}

/// A model in 16 bits, trained by AdamW through float32 copies.
class Copied {
 public:
  Copied(at::ScalarType dtype, const Layout& layout)
      : pieces(pieces_of(layers_in(dtype), stages_of(layout))), one_order_(one_order(layout)) {
    for (const at::Tensor& parameter : parameters_of(pieces))
      copies_.push_back(parameter.detach().to(at::kFloat).requires_grad_());
    optimizer_.emplace(copies_, torch::optim::AdamWOptions(0.01));
  }
  void step(const Tensors& gradients) {
    for (std::size_t i = 0; i < copies_.size(); ++i) copies_[i].mutable_grad() = gradients[i].clone();
    optimizer_->step();
    const Tensors parameters = parameters_of(pieces);
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < copies_.size(); ++i) parameters[i].copy_(copies_[i]);
  }
  void add_gradients(Truth& truth, const Tensors& gradients) const {
    std::size_t next = 0;
    for_each_parameter(pieces, [&](const std::string& name, const at::Tensor&) {
      truth["gradient of " + name] = {gradients[next++], one_order_ ? 0 : 1e-6};
    });
  }
  /// Sums in another order may round a weight to its neighbour.
  void add_weights(Truth& truth) const {
    for_each_parameter(pieces, [&](const std::string& name, const at::Tensor& parameter) {
      truth[name] = {parameter.detach().to(at::kFloat), one_order_ ? 0 : 0.01};
    });
  }

  std::vector<Piece> pieces;

 private:
  bool one_order_;
  Tensors copies_;
  std::optional<torch::optim::AdamW> optimizer_;
};

/// Three steps with gradients in float32, the second of which is skipped.
Truth bfloat16_truth(const Layout& layout) {
  Copied model(at::kBFloat16, layout);
  Truth truth{{"skipped", {torch::tensor({0, 1, 0}), 0}}};
  for (const int step : {0, 2}) {
    const std::vector<Batch> parts =
        parts_of_all(layout, [&](int replica) { return batch_in(at::kBFloat16, replica, step); });
    const Tensors sums = sums_of(model.pieces, parts, small_loss(1), 1);
    if (step == 0) model.add_gradients(truth, sums);
    model.step(sums);
  }
  model.add_weights(truth);
  return truth;
}

DualPipeOptions options_in_16_bits(const std::string& kind) {
  DualPipeOptions options = options_of(kind);
  options.gradient_dtype = GradientDtype::float32;
  options.on_non_finite = OnNonFinite::skip;
  return options;
}

Found bfloat16_run(const Mesh& mesh, const std::string& kind) {
  DualPipe pipe(mesh, options_in_16_bits(kind), as_factory(layers_in(at::kBFloat16)));
  torch::optim::AdamW optimizer(pipe->parameters(), torch::optim::AdamWOptions(0.01));
  MasterWeights weights(pipe->parameters());
  Found found;
  at::Tensor skipped = torch::zeros({3}, at::kLong);
  for (const int step : {0, 1, 2}) {
    optimizer.zero_grad();
    const StepResult result = pipe->step(batch_in(at::kBFloat16, mesh.replica(), step), small_loss(1));
    skipped[step] = result.skipped ? 1 : 0;
    if (step == 0)
      for (const auto& item : pipe->named_parameters())
        found["gradient of " + item.key()] = item.value().grad().clone();
    if (!result.skipped) weights.step(optimizer);
  }
  found["skipped"] = skipped;
  for (const auto& item : pipe->named_parameters()) found[item.key()] = item.value().detach().to(at::kFloat);
  return found;
}

constexpr double kTiny = 1e-8;
constexpr double kScale = 65536;

/// A step that is skipped, which halves the scale, and one whose gradients would be zeros without it.
Truth float16_truth(const Layout& layout) {
  Copied model(at::kHalf, layout);
  Truth truth{{"scale", {number(kScale / 2), 0}}, {"used", {torch::tensor({0, 1}), 0}}};
  const std::vector<Batch> parts = parts_of_all(layout, [](int replica) { return batch_in(at::kHalf, replica, 2); });
  Tensors sums = sums_of(model.pieces, parts, small_loss(kTiny), kScale / 2);
  for (at::Tensor& sum : sums) sum = sum * (2 / kScale);
  model.add_gradients(truth, sums);
  model.step(sums);
  model.add_weights(truth);
  return truth;
}

Found float16_run(const Mesh& mesh, const std::string& kind) {
  DualPipe pipe(mesh, options_in_16_bits(kind), as_factory(layers_in(at::kHalf)));
  torch::optim::AdamW optimizer(pipe->parameters(), torch::optim::AdamWOptions(0.01));
  MasterWeights weights(pipe->parameters());
  GradScaler scaler(mesh.world(), {.scale = kScale});
  const LossFn scaled = [&](const Tensors& outputs, const Tensors& targets) {
    return scaler.scale(small_loss(kTiny)(outputs, targets));
  };
  at::Tensor used = torch::zeros({2}, at::kLong);
  for (const int step : {1, 2}) {
    pipe->zero_grad();
    const StepResult result = pipe->step(batch_in(at::kHalf, mesh.replica(), step), scaled);
    if (scaler.unscale_(pipe->parameters(), result.skipped)) {
      used[step - 1] = 1;
      weights.step(optimizer);
    }
    scaler.update();
  }
  Found found{{"scale", number(scaler.current_scale())}, {"used", used}};
  for (const auto& item : pipe->named_parameters()) {
    found["gradient of " + item.key()] = item.value().grad().clone();
    found[item.key()] = item.value().detach().to(at::kFloat);
  }
  return found;
}

// --- computed again, with the same random numbers

Truth recompute_truth(const Layout& layout) {
  const NoisyTruth noisy = noisy_truth(kNoisySeed, kMicroBatches, layout.mesh.data, 2);
  Truth truth;
  for (std::size_t step = 0; step < noisy.losses.size(); ++step)
    truth["losses of step " + std::to_string(step)] = {torch::tensor(noisy.losses[step], f64())};
  for (const auto& item : noisy.weights) truth[item.key()] = {item.value()};
  return truth;
}

Found recompute_run(const Mesh& mesh, const std::string& kind) {
  DualPipeOptions options = options_of(kind);
  options.seed = kNoisySeed;
  std::vector<NamedLayer> layers = noisy_layers(/*of_context=*/true);
  for (NamedLayer& each : layers)
    each.make = [make = each.make] {
      Stage stage = make();
      return stage.recompute(true);
    };
  DualPipe pipe(mesh, options, split(layers, stages_of(mesh, kind)));
  torch::optim::SGD optimizer(pipe->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  Found found;
  for (const int step : {0, 1}) {
    optimizer.zero_grad();
    const Batch batch = noisy_batch(kMicroBatches, step, mesh.replica());
    found["losses of step " + std::to_string(step)] = pipe->step(batch, squared_error()).losses.clone();
    pipe->clip_grad_norm_(kNoisyNorm);
    optimizer.step();
  }
  for (const auto& item : noisy_weights(pipe)) found[item.key()] = item.value();
  return found;
}

// --- buffers of the ranks that hold a stage

/// Counts the largest entry of each row, as a router counts tokens, and has running statistics of holders and of whole
/// batches.
struct CountingImpl : torch::nn::Module {
  explicit CountingImpl(int number) : layer(register_module("layer", Layer(number))) {
    norm = register_module("norm", torch::nn::BatchNorm1d(kWidth));
    whole = register_module("whole", DeferredBatchNorm(kWidth));
    norm->to(torch::kDouble);
    whole->to(torch::kDouble);
    tokens = register_buffer("tokens", torch::zeros({kWidth}, torch::kInt64));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    tokens.add_(torch::bincount(x.detach().argmax(1), {}, kWidth));
    const torch::Tensor y = torch::exp(0.3 * norm(layer(x)));
    if (keeps) seen.push_back(y.detach());
    return whole(y);
  }
  Layer layer;
  torch::nn::BatchNorm1d norm{nullptr};
  DeferredBatchNorm whole{nullptr};
  torch::Tensor tokens;
  bool keeps = false;
  Tensors seen;  // what `whole` took
};
TORCH_MODULE(Counting);

/// One OpenMP thread while it lives: BatchNorm takes all cores, in each rank.
class OneThread {
 public:
  OneThread() : before_(at::get_num_threads()) { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

Batch large_batch(int replica, int step) { return random_batch(4 * kMicroBatches, 70 + 10 * step + replica); }

/// Each holder of a stage begins a step with the mean of all holders' statistics. A BatchNorm that takes all
/// micro-batches as one batch has those of whole batches.
Truth buffers_truth(const Layout& layout) {
  const OneThread one_thread;
  const Schedule schedule = schedule_of(layout);
  std::vector<Counting> model;
  std::vector<torch::nn::BatchNorm1d> wholes;
  for (int s = 0; s < schedule.num_stages; ++s) {
    model.emplace_back(s)->keeps = true;
    wholes.emplace_back(kWidth)->to(torch::kDouble);
  }
  Truth truth;
  for (const int step : {0, 1}) {
    const double scale = 1.0 / (kMicroBatches * layout.mesh.data);
    std::vector<std::map<std::pair<int, int>, std::pair<at::Tensor, at::Tensor>>> held(model.size());  // by holder
    std::vector<std::pair<at::Tensor, at::Tensor>> begin;
    for (Counting& module : model)
      begin.emplace_back(module->norm->running_mean.clone(), module->norm->running_var.clone());
    for (int replica = 0; replica < layout.mesh.data; ++replica) {
      const std::vector<Batch> parts = split_batch(large_batch(replica, step), kMicroBatches, 0);
      for (int m = 0; m < kMicroBatches; ++m) {
        at::Tensor x = parts[m].inputs[0];
        for (int s = 0; s < schedule.num_stages; ++s) {
          auto& norm = model[s]->norm;
          auto& [mean, variance] =
              held[s]
                  .try_emplace({replica, rank_of(schedule, s, m)}, begin[s].first.clone(), begin[s].second.clone())
                  .first->second;
          {
            const at::NoGradGuard no_grad;
            norm->running_mean.copy_(mean);
            norm->running_var.copy_(variance);
          }
          x = model[s]->forward(x);
          mean = norm->running_mean.clone();
          variance = norm->running_var.clone();
        }
        (torch::mse_loss(x, parts[m].targets[0]) * scale).backward();
      }
    }
    const at::NoGradGuard no_grad;
    for (int s = 0; s < schedule.num_stages; ++s) {
      at::Tensor mean = torch::zeros_like(begin[s].first), variance = torch::zeros_like(mean);
      for (const auto& [holder, statistics] : held[s]) {
        mean += statistics.first / static_cast<double>(held[s].size());
        variance += statistics.second / static_cast<double>(held[s].size());
      }
      model[s]->norm->running_mean.copy_(mean);
      model[s]->norm->running_var.copy_(variance);
      wholes[s]->forward(torch::cat(std::exchange(model[s]->seen, {})));
    }
  }
  for (int s = 0; s < schedule.num_stages; ++s) {
    const std::string stage = "stage" + std::to_string(s) + ".";
    for (const auto& item : model[s]->named_buffers())
      truth[stage + item.key()] = {item.value(), item.value().is_floating_point() ? 1e-12 : 0};
    for (const auto& item : wholes[s]->named_buffers()) truth[stage + "whole." + item.key()] = {item.value()};
    truth[stage + "whole.batch_sums"] = {torch::zeros({3, kWidth}, f64()), 0};
    for (const auto& item : model[s]->named_parameters())
      truth["gradient of " + stage + item.key()] = {item.value().grad()};
  }
  return truth;
}

Found buffers_run(const Mesh& mesh, const std::string& kind) {
  const OneThread one_thread;
  DualPipeOptions options = options_of(kind);
  options.compare_replicas_every = 1;
  options.buffers = {{"running_mean", BufferReduction::mean},
                     {"running_var", BufferReduction::mean},
                     {"num_batches_tracked", BufferReduction::sum},
                     {"whole.running_mean", BufferReduction::broadcast},
                     {"whole.running_var", BufferReduction::broadcast},
                     {"whole.num_batches_tracked", BufferReduction::local},
                     {"batch_sums", BufferReduction::sum},
                     {"tokens", BufferReduction::sum}};
  DualPipe pipe(mesh, options, [](int number) { return as_stage(Counting(number)); });
  for (const int step : {0, 1}) {
    pipe->step(large_batch(mesh.replica(), step), squared_error());
    commit_batch_norms(*pipe);
  }
  Found found;
  for (const auto& item : pipe->named_buffers()) found[item.key()] = item.value();
  for (const auto& item : pipe->named_parameters()) found["gradient of " + item.key()] = item.value().grad();
  return found;
}

// --- weights that stages of several ranks share, and stages that use parts of one model

Batch tokens_of(int replica, int step) { return token_batch(2 * kMicroBatches, 200 + 20 * step + 2 * replica); }

constexpr double kTiedNorm = 0.05;  // gradients are clipped to it

Truth tied_truth(const Layout& layout) {
  TiedModel model(stages_of(layout));
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  Truth truth;
  for (const int step : {0, 1}) {
    optimizer.zero_grad();
    std::vector<Batch> batches;
    for (int replica = 0; replica < layout.mesh.data; ++replica) batches.push_back(tokens_of(replica, step));
    tied_step(model, batches, kMicroBatches);
    truth["norm in step " + std::to_string(step)] = {
        number(torch::nn::utils::clip_grad_norm_(model->parameters(), kTiedNorm))};
    for (const auto& item : model->named_parameters())
      truth["gradient of " + item.key() + " in step " + std::to_string(step)] = {item.value().grad().clone()};
    optimizer.step();
  }
  for (const auto& item : model->named_parameters()) truth[item.key()] = {item.value().detach()};
  return truth;
}

Item tied(const std::string& name, StageFactory (*as_stages)(TiedModel model)) {
  return {name, tied_truth, [as_stages](const Mesh& mesh, const std::string& kind) {
            DualPipe pipe(mesh, options_of(kind), as_stages(TiedModel(stages_of(mesh, kind))));
            torch::optim::SGD optimizer(pipe->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
            Found found;
            for (const int step : {0, 1}) {
              optimizer.zero_grad();
              pipe->step(tokens_of(mesh.replica(), step), squared_error());
              found["norm in step " + std::to_string(step)] = pipe->clip_grad_norm_(kTiedNorm);
              for (const auto& item : pipe->named_parameters())
                found["gradient of " + name_in_model(item.key()) + " in step " + std::to_string(step)] =
                    item.value().grad().clone();
              optimizer.step();
            }
            for (const auto& item : pipe->named_parameters()) found[name_in_model(item.key())] = item.value().detach();
            return found;
          }};
}

// --- gradients of inputs

/// Calls its layer twice, for two tensors.
Piece twice(int stage) {
  Layer module(stage);
  return {module.ptr(), [module](const Tensors& x) mutable {
            return Tensors{module->forward(x[0]), module->forward(x[1] + 0.1 * x[0])};
          }};
}
LossFn distance() {
  return [](const Tensors& outputs, const Tensors& targets) {
    return torch::mse_loss(outputs[0], targets[0]) - 0.3 * torch::mse_loss(outputs[1], outputs[0]);
  };
}

/// The second input is left alone in the first step.
Batch pairs_batch(int rows, int replica, bool both) {
  Batch batch = random_batch(rows, 90 + 10 * replica);
  batch.inputs.push_back(seeded({rows, kWidth}, 95 + 10 * replica));
  batch.inputs[0].requires_grad_();
  batch.inputs[1].set_requires_grad(both);
  return batch;
}

constexpr int kUneven = 2 * kMicroBatches - 3;  // rows of three micro-batches, one of which has weight 0

std::vector<double> uneven_weights(const Batch& batch) {
  std::vector<double> weights = batch.weights;
  weights[1] = 0;
  return weights;
}

/// By the same gradients inputs are changed, as adversarial training does.
at::Tensor attacked(const at::Tensor& input, const at::Tensor& gradient) {
  return input.detach() + 0.05 * gradient.sign();
}

Truth inputs_truth(const Layout& layout) {
  std::vector<Piece> pieces = pieces_of(twice, stages_of(layout));
  Truth truth;
  const auto add = [&](const std::string& when, const std::vector<Batch>& whole, bool both) {
    for (int replica = 0; replica < layout.mesh.data; ++replica)
      for (const int input : {0, 1})
        if (input == 0 || both)
          truth[when + ": gradient of input " + std::to_string(input) + of_replica(replica)] = {
              whole[replica].inputs[input].grad()};
  };
  std::vector<Batch> whole;
  const auto one = [&](const std::string& when, bool both, int rows, int count, bool weighted) {
    zero_grad(pieces);
    double sum = 0, loss = 0;
    for (const Batch& batch : whole)
      for (const double weight : weighted ? uneven_weights(batch.chunk(count)) : std::vector<double>(count, 1))
        sum += weight;
    for (const Batch& batch : whole) {
      // Slices of the tensors whose gradients are wanted.
      int begin = 0;
      const std::vector<double> weights = weighted ? uneven_weights(batch.chunk(count)) : std::vector<double>(count, 1);
      for (int m = 0; m < count; ++m) {
        const int size = rows / count + (m < rows % count ? 1 : 0);
        Tensors x{batch.inputs[0].narrow(0, begin, size), batch.inputs[1].narrow(0, begin, size)};
        for (Piece& piece : pieces) x = piece.forward(x);
        const at::Tensor value = distance()(x, {batch.targets[0].narrow(0, begin, size)}) * (weights[m] / sum);
        value.backward();
        loss += value.item<double>();
        begin += size;
      }
    }
    truth[when + ": loss"] = {number(loss)};
    add_gradients(truth, when, pieces);
    add(when, whole, both);
  };
  for (int replica = 0; replica < layout.mesh.data; ++replica)
    whole.push_back(pairs_batch(2 * kMicroBatches, replica, false));
  one("whole", false, 2 * kMicroBatches, kMicroBatches, false);
  for (Batch& batch : whole) batch.inputs[0] = attacked(batch.inputs[0], batch.inputs[0].grad()).requires_grad_();
  one("attacked", false, 2 * kMicroBatches, kMicroBatches, false);
  whole.clear();
  for (int replica = 0; replica < layout.mesh.data; ++replica) whole.push_back(pairs_batch(kUneven, replica, true));
  one("uneven", true, kUneven, 3, true);
  return truth;
}

Found inputs_run(const Mesh& mesh, const std::string& kind) {
  DualPipe pipe(mesh, options_of(kind), as_factory(twice));
  Found found;
  const auto step = [&](const std::string& when, const Batch& batch) {
    pipe->zero_grad();
    StepResult result = pipe->step(batch, distance());
    found[when + ": loss"] = result.loss;
    add_gradients(found, when, pipe);
    EXPECT_EQ(result.input_gradients.empty(), !pipe->feeds_inputs());
    return std::move(result.input_gradients);
  };
  const auto name = [&](const std::string& when, int input) {
    return when + ": gradient of input " + std::to_string(input) + of_replica(mesh.replica());
  };
  Batch whole = pairs_batch(2 * kMicroBatches, mesh.replica(), false);
  for (const std::string when : {"whole", "attacked"}) {
    const Tensors gradients = step(when, pipe->broadcast_batch(whole));
    if (gradients.empty()) continue;
    EXPECT_EQ(gradients.size(), 2u);
    EXPECT_FALSE(gradients[1].defined());
    found[name(when, 0)] = gradients[0];
    if (when == "whole") whole.inputs[0] = attacked(whole.inputs[0], gradients[0]).requires_grad_();
  }
  Batch uneven = pairs_batch(kUneven, mesh.replica(), true).chunk(3);
  uneven.weights = uneven_weights(uneven);
  const Tensors gradients = step("uneven", uneven);
  if (gradients.empty()) return found;
  EXPECT_EQ(gradients.size(), 6u);
  for (const int input : {0, 1})
    found[name("uneven", input)] = torch::cat({gradients[input], gradients[2 + input], gradients[4 + input]});
  return found;
}

// --- two models that train each other

LossFn says(double sign) {
  return [sign](const at::Tensor& score, const at::Tensor&) { return torch::softplus(sign * score.mean(1)).mean(); };
}
Model discriminator() {
  return [](int stage) { return layer(20 + stage); };
}
at::Tensor noise(int replica, int step) { return seeded({2 * kMicroBatches, kWidth}, 300 + 10 * step + replica); }
at::Tensor real(int replica, int step) { return plain_batch(replica, step).inputs[0].abs(); }

Truth gan_truth(const Layout& layout) {
  const int num_stages = stages_of(layout);
  std::vector<Piece> generates = pieces_of(layer, num_stages), judges = pieces_of(discriminator(), num_stages);
  torch::optim::SGD generator(parameters_of(generates), 0.1), judge(parameters_of(judges), 0.1);
  const auto run = [](std::vector<Piece>& pieces, at::Tensor x) {
    for (Piece& piece : pieces) x = piece.forward({x})[0];
    return x;
  };
  const double scale = 1.0 / (kMicroBatches * layout.mesh.data);
  Truth truth;
  for (const int step : {0, 1}) {
    judge.zero_grad();
    double loss = 0;
    const auto for_each_part = [&](const auto& each) {
      for (int replica = 0; replica < layout.mesh.data; ++replica) {
        const auto reals = real(replica, step).chunk(kMicroBatches), noises = noise(replica, step).chunk(kMicroBatches);
        for (int m = 0; m < kMicroBatches; ++m) each(reals[m], noises[m]);
      }
    };
    for_each_part([&](const at::Tensor& real, const at::Tensor& noise) {
      const at::Tensor fake = run(generates, noise).detach();
      const at::Tensor value = scale * (says(-1)({run(judges, real)}, {real}) + says(1)({run(judges, fake)}, {real}));
      value.backward();
      loss += value.item<double>();
    });
    judge.step();
    generator.zero_grad();
    for_each_part([&](const at::Tensor& real, const at::Tensor& noise) {
      (scale * says(-1)({run(judges, run(generates, noise))}, {real})).backward();
    });
    generator.step();
    truth["loss of the discriminator in step " + std::to_string(step)] = {number(loss)};
  }
  for_each_parameter(generates, [&](const std::string& name, const at::Tensor& parameter) {
    truth["generator: " + name] = {parameter.detach()};
  });
  for_each_parameter(judges, [&](const std::string& name, const at::Tensor& parameter) {
    truth["discriminator: " + name] = {parameter.detach()};
  });
  return truth;
}

Found gan_run(const Mesh& mesh, const std::string& kind) {
  DualPipeOptions sums = options_of(kind);
  sums.loss_reduction = LossReduction::sum;
  DualPipe generates(mesh, sums, as_factory(layer)), judges(mesh, options_of(kind), as_factory(discriminator()));
  torch::optim::SGD generator(generates->parameters(), 0.1), judge(judges->parameters(), 0.1);
  const LossFn hands_on = [](const at::Tensor& output, const at::Tensor& gradient) {
    return (output * gradient).sum();
  };
  Found found;
  for (const int step : {0, 1}) {
    const at::Tensor z = noise(mesh.replica(), step), x = real(mesh.replica(), step);
    at::Tensor fake = generates->predict({.inputs = {z}}, /*everywhere=*/true).at(0);
    judge.zero_grad();
    const at::Tensor of_real = judges->step({.inputs = {x}, .targets = {x}}, says(-1)).loss;
    const at::Tensor of_fake = judges->step({.inputs = {fake}, .targets = {x}}, says(1)).loss;
    judge.step();
    found["loss of the discriminator in step " + std::to_string(step)] = of_real + of_fake;

    const StepResult result = judges->step({.inputs = {fake.requires_grad_()}, .targets = {x}}, says(-1));
    generator.zero_grad();
    // Ranks that feed have the gradients; those that compute the loss need them.
    generates->step(generates->broadcast_batch({.inputs = {z}, .targets = result.input_gradients}), hands_on);
    generator.step();
  }
  for (const auto& item : generates->named_parameters()) found["generator: " + item.key()] = item.value().detach();
  for (const auto& item : judges->named_parameters()) found["discriminator: " + item.key()] = item.value().detach();
  return found;
}

}  // namespace

std::vector<Item> items() {
  return {
      counted("loss weights, metrics, losses of stages", {kMicroBatches}),
      counted("uneven and other numbers of micro-batches", {3, 1, kMicroBatches + 1}),
      {"data where it is", data_truth, data_run},
      {"bfloat16", bfloat16_truth, bfloat16_run},
      {"float16", float16_truth, float16_run},
      {"recompute", recompute_truth, recompute_run},
      {"buffers", buffers_truth, buffers_run},
      tied("tied weights", modules_as_stages),
      tied("parts of one model", whole_model_as_stages),
      {"gradients of inputs", inputs_truth, inputs_run},
      {"generator and discriminator", gan_truth, gan_run},
  };
}

std::vector<Layout> layouts_of(int num_ranks) {
  std::vector<Layout> all;
  for (const std::string& kind : schedule_kinds()) all.push_back({kind, {.pipeline = num_ranks}});
  if (num_ranks == 4)
    for (const std::string kind : {"dualpipe", "1f1b"}) all.push_back({kind, {.pipeline = 2, .data = 2}});
  return all;
}

}  // namespace dualpipe::test
