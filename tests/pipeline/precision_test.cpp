// Gradients in float32, steps that are not finite, gradient scaling and autocast: as one process does it.
#include <ATen/autocast_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/torch.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/train/grad_scaler.hpp"
#include "dualpipe/train/master_weights.hpp"
#include "dualpipe/train/mesh.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Kind {
  std::string name;
  int num_ranks;
  bool one_order;  ///< one holder adds up the micro-batches in their order, so results are bitwise those of one process
};
const std::vector<Kind> kKinds{{"dualpipe", 2, false},  {"dualpipe", 4, false}, {"dualpipev", 2, false},
                               {"1f1b", 4, true},       {"zb1p", 4, true},      {"zbv", 2, false},
                               {"interleaved", 2, true}};

int stages_of(const Kind& kind) {
  return make_schedule({.kind = kind.name, .num_ranks = kind.num_ranks, .num_micro_batches = kMicroBatches}).num_stages;
}

Model layers_in(at::ScalarType dtype) {
  return [dtype](int stage) {
    Piece piece = layer(stage);
    piece.module->to(dtype);
    return piece;
  };
}

Batch batch_in(at::ScalarType dtype, std::uint64_t seed = 3) {
  Batch batch = random_batch(2 * kMicroBatches, seed);
  batch.inputs[0] = batch.inputs[0].to(dtype);
  batch.targets[0] = batch.targets[0].to(at::kFloat);
  return batch;
}

LossFn error_in_float() {
  return
      [](const at::Tensor& output, const at::Tensor& target) { return torch::mse_loss(output.to(at::kFloat), target); };
}

using Sums = std::map<int, std::map<std::string, at::Tensor>>;  // by stage and name

/// The gradients of one process that adds those of the micro-batches up in float32.
Sums sums_of(const Model& model, int num_stages, const Batch& batch, const LossFn& loss, double scale) {
  std::vector<Piece> pieces;
  for (int s = 0; s < num_stages; ++s) pieces.push_back(model(s));
  Sums sums;
  for (const Batch& part : split_batch(batch, kMicroBatches, 0)) {
    Tensors tensors = part.inputs;
    for (Piece& piece : pieces) tensors = piece.forward(tensors);
    (loss(tensors, part.targets) * scale).backward();
    for (std::size_t s = 0; s < pieces.size(); ++s)
      for (const auto& item : pieces[s].module->named_parameters()) {
        at::Tensor& sum = sums[static_cast<int>(s)][item.key()];
        const at::Tensor gradient = item.value().grad().to(at::kFloat);
        sum = sum.defined() ? sum + gradient : gradient;
        item.value().mutable_grad().reset();
      }
  }
  return sums;
}

void expect_sums(DualPipe& pipe, const Sums& sums, bool bitwise) {
  for (const auto& child : pipe->named_children())
    for (const auto& item : child.value()->named_parameters()) {
      SCOPED_TRACE(child.key() + "." + item.key());
      const at::Tensor truth = sums.at(std::stoi(child.key().substr(5))).at(item.key());
      ASSERT_TRUE(item.value().grad().defined());
      EXPECT_EQ(item.value().grad().scalar_type(), at::kFloat);
      EXPECT_LE(difference(item.value().grad(), truth), bitwise ? 0 : 1e-6);
    }
}

// --- gradients in float32

struct ScaleImpl : torch::nn::Module {
  explicit ScaleImpl(at::ScalarType dtype) { weight = register_parameter("weight", torch::ones({1}, dtype)); }
  torch::Tensor forward(const torch::Tensor& x) { return x * weight; }
  torch::Tensor weight;
};
TORCH_MODULE(Scale);

TEST(GradientDtype, ManyMicroBatchesAddUpWithoutLoss) {
  constexpr int count = 256;
  constexpr double each = 1.0625;
  Batch batch;
  batch.inputs = {torch::full({count, 1}, each, at::kBFloat16)};
  batch.targets = {torch::zeros({count, 1}, at::kBFloat16)};
  const LossFn sum = [](const at::Tensor& output, const at::Tensor&) { return output.sum(); };
  at::Tensor own = torch::zeros({}, at::kBFloat16);  // as autograd adds them up
  for (int m = 0; m < count; ++m) own += torch::full({}, each, at::kBFloat16);
  EXPECT_LT(own.item<double>(), 272);
  for (const GradientDtype dtype : {GradientDtype::parameter, GradientDtype::float32})
    for (const auto& [kind, num_ranks, one_order] : kKinds) {
      SCOPED_TRACE(kind);
      if (dtype == GradientDtype::parameter && !one_order) continue;
      run_ranks(num_ranks, [&, &kind = kind](std::shared_ptr<Communicator> comm) {
        DualPipe pipe(comm,
                      {.num_micro_batches = count,
                       .schedule = kind,
                       .loss_reduction = LossReduction::sum,
                       .gradient_dtype = dtype},
                      [](int) { return as_stage(Scale(at::kBFloat16)); });
        pipe->step(batch, sum);
        for (const at::Tensor& parameter : pipe->parameters()) {
          EXPECT_EQ(parameter.grad().item<double>(), dtype == GradientDtype::float32 ? 272 : own.item<double>());
          EXPECT_EQ(parameter.grad().scalar_type(), dtype == GradientDtype::float32 ? at::kFloat : at::kBFloat16);
        }
      });
    }
}

TEST(GradientDtype, LeavesHooksAndAbsentGradientsAsTheyAre) {
  struct Hook : torch::autograd::PostAccumulateGradHook {
    explicit Hook(int& count) : calls(count) {}
    void operator()(const at::Tensor& parameter) override {
      EXPECT_EQ(parameter.grad().scalar_type(), at::kFloat);
      ++calls;
    }
    int& calls;
  };
  const Model model = [](int stage) {
    Piece piece = layers_in(at::kBFloat16)(stage);
    piece.module->register_parameter("unused", torch::ones({2}, at::kBFloat16));
    return piece;
  };
  const Batch batch = batch_in(at::kBFloat16);
  run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .gradient_dtype = GradientDtype::float32},
                  as_factory(model));
    int calls = 0;
    const auto named = pipe->named_parameters();
    const at::Tensor hooked = named["stage0.weight"], widened = named["stage1.weight"];
    torch::autograd::impl::set_post_acc_grad_hooks(hooked, std::make_unique<Hook>(calls));
    widened.mutable_grad() = torch::ones_like(widened);  // bfloat16
    const LossFn fails = [](const at::Tensor&, const at::Tensor&) -> at::Tensor { throw Error("no"); };
    pipe->step(batch, error_in_float());
    EXPECT_EQ(calls, kMicroBatches / 2);
    EXPECT_FALSE(named["stage0.unused"].grad().defined());
    EXPECT_EQ(widened.grad().scalar_type(), at::kFloat);
    EXPECT_FALSE(message_of([&] { pipe->step(batch, fails); }).empty());
    EXPECT_NE(dynamic_cast<Hook*>(torch::autograd::impl::post_acc_grad_hooks(hooked).get()), nullptr);
    EXPECT_EQ(torch::autograd::impl::post_acc_grad_hooks(widened), nullptr);
    // An optimizer without copies takes them too, and rounds.
    torch::optim::AdamW(pipe->parameters(), torch::optim::AdamWOptions(0.01)).step();
    EXPECT_EQ(hooked.scalar_type(), at::kBFloat16);
  });
}

TEST(MasterWeights, BadInput) {
  const auto weight = torch::ones({2}, at::kBFloat16).requires_grad_();
  EXPECT_THAT(message_of([&] { MasterWeights({weight, at::Tensor()}); }), HasSubstr("tensor 1 of them is undefined"));
  EXPECT_THAT(message_of([&] { MasterWeights({weight, weight}); }), HasSubstr("tensor 1 of them comes twice"));
  EXPECT_THAT(message_of([&] { MasterWeights({weight * 2}); }), HasSubstr("tensor 0 of them was computed"));
  const auto wide = torch::ones({2}).requires_grad_();
  MasterWeights weights({weight, wide});
  EXPECT_TRUE(weights.masters()[1].is_same(wide));
  torch::optim::SGD optimizer({weight, wide}, torch::optim::SGDOptions(1e-3).momentum(0.5));
  for (int step = 0; step < 8; ++step) {
    weight.mutable_grad() = torch::ones({2});
    weights.step(optimizer);
  }
  EXPECT_FALSE(wide.grad().defined());
  EXPECT_TRUE(optimizer.param_groups()[0].params()[0].is_same(weight));
  EXPECT_EQ(optimizer.state().count(weight.unsafeGetTensorImpl()), 1u);  // as a checkpoint looks for it
  EXPECT_NEAR(weight[0].item<double>(), 0.986, 0.002);                   // a step of a thousandth alone would be lost
  // What was set by others counts.
  {
    const at::NoGradGuard no_grad;
    weight[1] = 3;
  }
  weights.take_gradients();
  EXPECT_EQ(weights.masters()[0][1].item<double>(), 3);
  EXPECT_NE(weights.masters()[0][0].item<double>(), weight[0].item<double>());
}

// --- not finite

/// Stage 1 has a finite output and a gradient that is none while `armed`.
Model with_singularity(const std::atomic<bool>& armed) {
  return [&armed](int stage) {
    Piece piece = layer(stage);
    piece.module->register_buffer("calls", torch::zeros({1}));
    const at::Tensor calls = piece.module->buffers()[0], bias = piece.module->named_parameters()["bias"];
    return Piece{piece.module, [&armed, piece, stage, calls, bias](const Tensors& x) {
                   calls.add_(1);
                   Tensors y = piece.forward(x);
                   if (stage == 1 && armed) y[0] = y[0] + (bias - bias).sqrt();
                   return y;
                 }};
  };
}

Batch with_nan(Batch batch, int micro_batch) {
  batch.targets[0] = batch.targets[0].clone();
  batch.targets[0][2 * micro_batch].fill_(std::numeric_limits<double>::quiet_NaN());
  return batch;
}

TEST(OnNonFinite, LeavesEverythingAsItWasOnAllRanks) {
  const Batch batch = random_batch(2 * kMicroBatches, 3);
  for (const Kind& kind : kKinds) {
    for (const OnNonFinite choice : {OnNonFinite::error, OnNonFinite::skip, OnNonFinite::keep}) {
      SCOPED_TRACE(kind.name);
      const int num_stages = stages_of(kind);
      const Reference truth = reference(layer, num_stages, batch, kMicroBatches, squared_error(), 1.0 / kMicroBatches);
      std::atomic<bool> armed{false};
      std::atomic<int> skipped{0};
      const auto body = [&](std::shared_ptr<Communicator> comm, std::string& text) {
        DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = kind.name, .on_non_finite = choice},
                      as_factory(with_singularity(armed)));
        pipe->step(batch, squared_error());
        expect_gradients(pipe, truth);
        Tensors before, buffers;
        for (const at::Tensor& parameter : pipe->parameters()) before.push_back(parameter.grad());
        for (const at::Tensor& buffer : pipe->buffers()) buffers.push_back(buffer.clone());
        const auto check = [&] {
          std::size_t i = 0;
          for (const at::Tensor& parameter : pipe->parameters()) EXPECT_TRUE(parameter.grad().is_same(before[i++]));
          i = 0;
          for (const at::Tensor& buffer : pipe->buffers()) EXPECT_TRUE(torch::equal(buffer, buffers[i++]));
          expect_gradients(pipe, truth);
        };
        const auto bad_step = [&](const Batch& with) {
          text += message_of([&] {
            if (pipe->step(with, squared_error()).skipped) ++skipped;
          });
          text += '\n';
          if (choice != OnNonFinite::keep) check();
        };
        bad_step(with_nan(batch, 5));
        comm->barrier().wait();
        armed = true;
        bad_step(batch);
        comm->barrier().wait();
        armed = false;
        if (choice == OnNonFinite::keep) {
          EXPECT_FALSE(pipe->parameters()[0].grad().isfinite().all().item<bool>());
          return;
        }
        EXPECT_FALSE(pipe->step(batch, squared_error()).skipped);
        expect_gradients(pipe, truth, 1e-12, 2);
      };
      std::mutex mutex;
      std::set<std::string> texts;
      run_ranks(kind.num_ranks, [&](std::shared_ptr<Communicator> comm) {
        std::string text;
        body(comm, text);
        const std::lock_guard lock(mutex);
        texts.insert(text);
      });
      ASSERT_EQ(texts.size(), 1u) << ::testing::PrintToString(texts);
      EXPECT_EQ(skipped, choice == OnNonFinite::skip ? 2 * kind.num_ranks : 0);
      if (choice == OnNonFinite::error) {
        EXPECT_THAT(
            *texts.begin(),
            AllOf(HasSubstr("step 2 is not finite: the loss of micro-batch 5 is nan, the gradient of parameter '"),
                  HasSubstr("step 3 is not finite: the gradient of parameter 'bias' of stage 1 on rank "),
                  HasSubstr("on_non_finite = skip")));
      } else {
        EXPECT_EQ(*texts.begin(), "\n\n");
      }
    }
  }
}

TEST(OnNonFinite, AGradientOfAnInputIsOne) {
  const Model model = [](int stage) {
    const Piece piece = layer(stage);
    return Piece{piece.module, [piece](const Tensors& x) { return piece.forward({x[0].pow(2).sqrt()}); }};
  };
  for (const OnNonFinite choice : {OnNonFinite::error, OnNonFinite::skip})
    EXPECT_THAT(failure_on_all(2,
                               [&](std::shared_ptr<Communicator> comm) {
                                 DualPipe pipe(
                                     comm,
                                     {.num_micro_batches = kMicroBatches, .schedule = "1f1b", .on_non_finite = choice},
                                     as_factory(model));
                                 Batch batch = random_batch(2 * kMicroBatches, 3);
                                 batch.inputs[0][5].zero_();
                                 EXPECT_FALSE(pipe->step(batch, squared_error()).skipped);
                                 batch.inputs[0].requires_grad_();
                                 if (pipe->step(batch, squared_error()).skipped) throw Error("skipped");
                               }),
                choice == OnNonFinite::error ? HasSubstr("step 2 is not finite: the gradient of an input on rank 0.")
                                             : HasSubstr("skipped"));
}

TEST(OnNonFinite, AMicroBatchOfAnotherReplicaIsNamed) {
  const std::string text = failure_on_all(4, [](std::shared_ptr<Communicator> comm) {
    const Mesh mesh(comm, {.pipeline = 2, .data = 2});
    DualPipe pipe(mesh, {.num_micro_batches = kMicroBatches, .schedule = "1f1b"}, as_factory(layer));
    const Batch batch = random_batch(2 * kMicroBatches, 3);
    pipe->step(mesh.replica() == 1 ? with_nan(batch, 6) : batch, squared_error());
  });
  EXPECT_THAT(text, HasSubstr("step 1 is not finite: the loss of micro-batch 6 of replica 1 is nan"));
}

TEST(OnNonFinite, OfAnAsynchronousStepIsKnownAfterwards) {
  const auto options = [](OnNonFinite choice) {
    return DualPipeOptions{.num_micro_batches = kMicroBatches, .on_non_finite = choice, .asynchronous = true};
  };
  EXPECT_THAT(failure_on_all(2, [&](auto comm) { DualPipe pipe(comm, options(OnNonFinite::skip), as_factory(layer)); }),
              HasSubstr("cannot be skipped"));
  const Batch batch = random_batch(2 * kMicroBatches, 3);
  const auto what = AllOf(HasSubstr("step 2 is not finite: the loss of micro-batch 1 is nan, "),
                          HasSubstr("gradients, those of each rank counted"), HasSubstr("go back to a checkpoint"));
  run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, options(OnNonFinite::error), as_factory(layer));
    pipe->step(batch, squared_error()).wait();
    const StepResult result = pipe->step(with_nan(batch, 1), squared_error());
    EXPECT_THAT(message_of([&] { result.wait(); }), what);
    EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }), what);
  });
  run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, options(OnNonFinite::keep), as_factory(layer));
    pipe->step(with_nan(batch, 1), squared_error()).wait();
    pipe->step(batch, squared_error()).wait();
  });
}

TEST(Clip, ANormThatIsNotFinite) {
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = "1f1b"}, as_factory(layer));
    pipe->step(random_batch(2 * kMicroBatches, 3), squared_error());
    if (comm->rank() == 1) pipe->parameters()[0].mutable_grad()[0][0] = std::numeric_limits<double>::infinity();
    Tensors before;
    for (const at::Tensor& parameter : pipe->parameters()) before.push_back(parameter.grad().clone());
    EXPECT_THAT(message_of([&] { pipe->clip_grad_norm_(1e-3, true); }), HasSubstr("the norm of the gradients is inf"));
    std::size_t i = 0;
    for (const at::Tensor& parameter : pipe->parameters()) EXPECT_TRUE(torch::equal(parameter.grad(), before[i++]));
    EXPECT_TRUE(std::isinf(pipe->clip_grad_norm_(1e-3).item<double>()));
    EXPECT_TRUE(pipe->parameters()[1].grad().eq(0).all().item<bool>());  // as torch.nn.utils.clip_grad_norm_ does
  });
}

// --- float16

TEST(GradScaler, AnInfiniteGradientOfOneRankIsUsedByNone) {
  const Batch batch = batch_in(at::kHalf);
  for (const std::string kind : {"dualpipe", "1f1b"})
    run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm,
                    {.num_micro_batches = kMicroBatches,
                     .schedule = kind,
                     .gradient_dtype = GradientDtype::float32,
                     .on_non_finite = OnNonFinite::keep},
                    as_factory(layers_in(at::kHalf)));
      GradScaler scaler(comm, {.scale = 1024, .growth_interval = 2});
      const LossFn scaled = [&](const at::Tensor& output, const at::Tensor& target) {
        return scaler.scale(error_in_float()({output}, {target}));
      };
      const double unscaled = pipe->evaluate(batch, scaled).loss.item<double>();
      EXPECT_NEAR(pipe->step(batch, scaled).loss.item<double>(), unscaled, 1e-12);
      EXPECT_TRUE(scaler.unscale_(pipe->parameters()));
      scaler.update();
      EXPECT_EQ(scaler.growth_tracker(), 1);

      pipe->zero_grad();
      pipe->step(batch, scaled);
      if (comm->rank() == 1) pipe->parameters()[0].mutable_grad()[0][0] = std::numeric_limits<float>::infinity();
      EXPECT_FALSE(scaler.unscale_(pipe->parameters()));
      scaler.update();
      EXPECT_EQ(scaler.current_scale(), 512);
      EXPECT_EQ(scaler.growth_tracker(), 0);
    });
}

TEST(GradScaler, OverflowInTheBackwardIsSkippedByTheVote) {
  const Batch batch = batch_in(at::kHalf);
  run_ranks(4, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm,
                  {.num_micro_batches = kMicroBatches,
                   .gradient_dtype = GradientDtype::float32,
                   .on_non_finite = OnNonFinite::skip},
                  as_factory(layers_in(at::kHalf)));
    GradScaler scaler(comm, {.scale = 1e9, .growth_interval = 1});
    const LossFn scaled = [&](const at::Tensor& output, const at::Tensor& target) {
      return scaler.scale(error_in_float()({output}, {target}));
    };
    int steps = 0;
    for (bool used = false; !used; ++steps) {
      ASSERT_LT(steps, 40);
      pipe->zero_grad();
      const StepResult result = pipe->step(batch, scaled);
      const double before = scaler.current_scale();
      used = scaler.unscale_(pipe->parameters(), result.skipped);
      EXPECT_EQ(used, !result.skipped);
      scaler.update();
      EXPECT_EQ(scaler.current_scale(), used ? 2 * before : before / 2);
    }
    EXPECT_GT(steps, 1);
  });
}

TEST(GradScaler, BadInputIsAnErrorOnAllRanks) {
  const auto refused = [](const GradScalerOptions& options) {
    return failure_on_all(2, [&](auto comm) { GradScaler scaler(comm, options); });
  };
  EXPECT_THAT(refused({.scale = 0}), HasSubstr("a scale that is positive and finite in float32, got 0"));
  EXPECT_THAT(refused({.scale = 1e40}), HasSubstr("got 1e+40"));
  EXPECT_THAT(refused({.growth = 1}), HasSubstr("a growth above 1, got 1"));
  EXPECT_THAT(refused({.backoff = 1}), HasSubstr("a backoff between 0 and 1, got 1"));
  EXPECT_THAT(refused({.growth_interval = 0}), HasSubstr("growth_interval of at least 1, got 0"));
  EXPECT_THAT(failure_on_all(2, [](auto comm) { GradScaler scaler(comm, {.scale = 1.0 + comm->rank()}); }),
              HasSubstr("ranks disagree about the options of GradScaler"));
  run_ranks(2, [](std::shared_ptr<Communicator> comm) {
    GradScaler scaler(comm);
    const auto weight = torch::ones({2}).requires_grad_();
    EXPECT_THAT(message_of([&] { scaler.update(); }), HasSubstr("needs unscale_() before it"));
    EXPECT_THAT(message_of([&] { scaler.unscale_({weight}); }), HasSubstr("no rank has a gradient"));
    weight.mutable_grad() = torch::ones({2}, comm->rank() == 1 ? at::kHalf : at::kFloat);
    EXPECT_THAT(message_of([&] { scaler.unscale_({weight}); }), AllOf(HasSubstr("rank 1: "), HasSubstr("in float16")));
    weight.mutable_grad() = torch::full({2}, 65536.0);
    EXPECT_TRUE(scaler.unscale_({weight}));
    EXPECT_EQ(weight.grad()[0].item<double>(), 1);
    EXPECT_THAT(message_of([&] { scaler.unscale_({weight}); }), HasSubstr("was called before"));
    scaler.update();
    scaler.restore(8, 5);
    EXPECT_EQ(scaler.current_scale(), 8);
    EXPECT_EQ(scaler.growth_tracker(), 5);
    EXPECT_THAT(message_of([&] { scaler.restore(-1, 5); }), HasSubstr("got -1"));
    EXPECT_THAT(message_of([&] { scaler.restore(8, -5); }), HasSubstr("got -5"));
  });
}

// --- autocast

/// On the calling thread, while it lives.
class Autocast {
 public:
  explicit Autocast(bool enabled = true) : before_(at::autocast::is_autocast_enabled(at::kCPU)) {
    at::autocast::set_autocast_enabled(at::kCPU, enabled);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  }
  ~Autocast() { at::autocast::set_autocast_enabled(at::kCPU, before_); }

 private:
  bool before_;
};

TEST(Autocast, EqualsOneProcess) {
  const Batch batch = batch_in(at::kFloat);
  const Model model = layers_in(at::kFloat);
  const Model in_autocast = [model](int stage) {
    const Piece piece = model(stage);
    return Piece{piece.module, [piece](const Tensors& x) {
                   const Autocast autocast;
                   return piece.forward(x);
                 }};
  };
  for (const Kind& kind : kKinds) {
    SCOPED_TRACE(kind.name);
    at::autocast::set_autocast_cache_enabled(false);
    const Sums sums = sums_of(in_autocast, stages_of(kind), batch, error_in_float(), 1.0 / kMicroBatches);
    at::autocast::set_autocast_cache_enabled(true);
    const Sums exact = sums_of(model, stages_of(kind), batch, error_in_float(), 1.0 / kMicroBatches);
    EXPECT_GT(difference(sums.at(0).at("weight"), exact.at(0).at("weight")), 1e-4);
    for (const bool around : {false, true}) {
      run_ranks(kind.num_ranks, [&](std::shared_ptr<Communicator> comm) {
        const Autocast autocast(around);
        DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = kind.name},
                      as_factory(around ? model : in_autocast));
        pipe->evaluate(batch, error_in_float());  // leaves no casts without history behind
        for (int step = 1; step <= 2; ++step) {
          pipe->zero_grad();
          pipe->step(batch, error_in_float());
          expect_sums(pipe, sums, kind.one_order);
        }
        EXPECT_TRUE(at::autocast::is_autocast_cache_enabled());
      });
    }
  }
}

}  // namespace
}  // namespace dualpipe::test
