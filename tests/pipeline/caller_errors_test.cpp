// What a caller can correct is InvalidArgument with one text on every rank, in any call, and the pipeline stays usable.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

/// What the ranks of a run say, by the name of a call.
class Findings {
 public:
  /// Runs `body` on one rank and notes its error.
  void note(const std::string& call, const std::function<void()>& body) {
    std::string text = "no error";
    try {
      body();
    } catch (const InvalidArgument& error) {
      text = error.what();
    } catch (const std::exception& error) {
      text = std::string("another exception: ") + error.what();
    }
    const std::lock_guard lock(mutex_);
    texts_[call].insert(text);
  }
  /// The one text of all ranks.
  std::string operator[](const std::string& call) const {
    const auto& texts = texts_.at(call);
    EXPECT_EQ(texts.size(), 1u) << call << ": " << ::testing::PrintToString(texts);
    return *texts.begin();
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::set<std::string>> texts_;
};

LossFn no_loss() { return nullptr; }

TEST(CallerErrors, InAnyStepLeaveEverythingAsItWas) {
  const Batch good = random_batch(16, 3);
  for (const std::string kind : {"dualpipe", "1f1b"}) {
    SCOPED_TRACE(kind);
    const Reference expected = reference(layer, kRanks, good, kMicroBatches, squared_error(), 1.0 / kMicroBatches);
    Findings findings;
    run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
      const bool last = comm->rank() == kRanks - 1;
      Batch undefined = random_batch(16, 3);
      undefined.inputs[0] = torch::Tensor();
      std::vector<Batch> parts = split_batch(good, kMicroBatches, 0);
      parts[2].inputs[0] = torch::Tensor();
      Batch without_targets = good;
      without_targets.targets.clear();

      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches, .schedule = kind}, as_factory(layer));
      int steps = 0;
      const auto check = [&] {
        EXPECT_EQ(pipe->step(good, squared_error()).micro_batch_losses(), expected.losses);
        expect_gradients(pipe, expected, 1e-12, ++steps);
      };
      for (const std::string when : {"first", "later"}) {
        const auto bad = [&](const std::string& call, const Batch& batch, const LossFn& loss = squared_error()) {
          findings.note(when + " step: " + call, [&] { pipe->step(batch, loss); });
          if (steps > 0) expect_gradients(pipe, expected, 1e-12, steps);
          findings.note(when + " evaluate: " + call, [&] { pipe->evaluate(batch, loss); });
          findings.note(when + " predict: " + call, [&] { pipe->predict(batch); });
        };
        bad("does not divide", random_batch(10, 1));
        bad("does not divide on one rank", last ? random_batch(10, 1) : good);
        bad("empty on one rank", last ? Batch{} : good);
        bad("undefined", undefined);
        bad("undefined micro-batch", Batch::from_micro_batches(parts));
        bad("no loss", good, last ? no_loss() : squared_error());
        bad("no targets on one rank", last ? without_targets : good);
        findings.note(when + " step: two micro-batches on one rank",
                      [&] { pipe->step(last ? Batch::from_micro_batches({good, good}) : good, squared_error()); });
        check();
      }
    });
    const auto found = [&](const std::string& call) {
      EXPECT_EQ(findings["first " + call], findings["later " + call]);
      return findings["later " + call];
    };
    for (const std::string method : {"step: ", "evaluate: ", "predict: "}) {
      SCOPED_TRACE(method);
      EXPECT_THAT(found(method + "does not divide"), HasSubstr("8 micro-batches do not divide"));
      EXPECT_THAT(found(method + "undefined"), HasSubstr("inputs[0] is undefined"));
      EXPECT_THAT(found(method + "undefined micro-batch"), HasSubstr("micro-batch 2: Batch::inputs[0] is undefined"));
      EXPECT_THAT(found(method + "does not divide on one rank"), AllOf(HasSubstr("rank 3: "), HasSubstr("10")));
      // Predictions take no loss and no targets.
      const bool predicts = method == "predict: ";
      EXPECT_THAT(found(method + "no loss"),
                  HasSubstr(predicts ? "no error" : "rank 3 computes the loss but got no loss function"));
      EXPECT_THAT(found(method + "no targets on one rank"),
                  HasSubstr(predicts ? "no error" : "rank 3 got a batch without targets"));
      const bool needed = !predicts || kind == "dualpipe";
      EXPECT_THAT(found(method + "empty on one rank"), HasSubstr(needed ? "rank 3 got an empty batch" : "no error"));
    }
    EXPECT_THAT(found("step: two micro-batches on one rank"),
                HasSubstr("that of rank 0 has 8 micro-batches, that of rank 3 has 2"));
  }
}

TEST(CallerErrors, PassingWhatARankNeedsIsEnough) {
  const Batch batch = random_batch(16, 3);
  for (const std::string kind : {"1f1b", "dualpipev", "dualpipe"}) {
    for (const bool by_hand : {false, true}) {
      SCOPED_TRACE(kind + (by_hand ? ", micro-batches made by hand" : ""));
      const int num_stages = kind == "dualpipev" ? 2 * kRanks : kRanks;
      const Reference expected =
          reference(layer, num_stages, batch, kMicroBatches, squared_error(), 1.0 / kMicroBatches);
      run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
        DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches, .schedule = kind}, as_factory(layer));
        Batch needed, inputs;
        if (pipe->feeds_inputs()) inputs.inputs = needed.inputs = batch.inputs;
        if (pipe->computes_loss()) needed.targets = batch.targets;
        if (by_hand && !needed.empty()) needed = Batch::from_micro_batches(split_batch(needed, kMicroBatches, 0));
        for (int step = 1; step <= 2; ++step) {
          EXPECT_EQ(pipe->step(needed, squared_error()).micro_batch_losses(), expected.losses);
          EXPECT_EQ(pipe->evaluate(needed, squared_error()).micro_batch_losses(), expected.losses);
          const Tensors merged = pipe->predict(inputs);
          ASSERT_EQ(merged.size(), pipe->computes_loss() ? 1u : 0u);
          for (int m = 0; m < kMicroBatches && !merged.empty(); ++m)
            EXPECT_TRUE(torch::equal(merged[0].narrow(0, 2 * m, 2), expected.outputs[m][0]));
          expect_gradients(pipe, expected, 1e-12, step);
        }
      });
    }
  }
}

TEST(CallerErrors, WhatRanksDisagreeAbout) {
  const Batch good = random_batch(16, 3);
  Findings findings;
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    const bool odd = comm->rank() == 2;
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, as_factory(layer));
    const auto freeze = [&](bool frozen) {
      for (auto& parameter : pipe->parameters()) parameter.set_requires_grad(!frozen);
    };
    for (int round = 0; round < 2; ++round) {
      findings.note("methods", [&] {
        if (odd) {
          pipe->predict(good);
        } else {
          pipe->step(good, squared_error());
        }
      });
      findings.note("counts", [&] {
        pipe->evaluate(Batch::from_micro_batches(split_batch(good, odd ? 4 : 8, 0)), squared_error());
      });
      findings.note("values", [&] { pipe->evaluate(odd ? random_batch(16, 4) : good, squared_error()); });
      if (odd) freeze(true);
      findings.note("frozen", [&] { pipe->step(good, squared_error()); });
      freeze(false);
      pipe->step(good, squared_error());
    }
    expect_gradients(pipe, reference(layer, kRanks, good, kMicroBatches, squared_error(), 1.0 / kMicroBatches), 1e-12,
                     2);
  });
  EXPECT_THAT(findings["methods"], AllOf(HasSubstr("rank 0 calls step(), rank 2 calls predict()")));
  EXPECT_THAT(findings["counts"], AllOf(HasSubstr("rank 0 has 8 micro-batches"), HasSubstr("rank 2 has 4")));
  EXPECT_THAT(findings["values"], AllOf(HasSubstr("ranks disagree about the batch"), HasSubstr("inputs of rank 2")));
  EXPECT_THAT(findings["frozen"], AllOf(HasSubstr("ranks 1 and 2"), HasSubstr("require grad")));
}

/// Loaders that shuffle differently from the third step on: inputs would belong to other targets.
TEST(CallerErrors, DataThatDifferAfterTheFirstStep) {
  Findings findings;
  const Batch good = random_batch(16, 3);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, as_factory(layer));
    Batch other = good;
    if (comm->rank() == 3) other.targets[0] = good.targets[0].roll(1, 0);
    pipe->step(good, squared_error());
    pipe->step(good, squared_error());
    findings.note("order", [&] { pipe->step(other, squared_error()); });
    findings.note("by hand", [&] {
      pipe->step(Batch::from_micro_batches(split_batch(other, kMicroBatches, 0)), squared_error());
    });
    expect_gradients(pipe, reference(layer, kRanks, good, kMicroBatches, squared_error(), 1.0 / kMicroBatches), 1e-12,
                     2);
    // Who passes nothing is not compared.
    if (comm->rank() != 0) other.targets.clear();
    if (comm->rank() == 0 || comm->rank() == 3) other = good;
    pipe->step(other, squared_error());
  });
  EXPECT_THAT(findings["order"],
              AllOf(HasSubstr("batch of step 3, those of the steps before were alike: Batch::targets of rank 3"),
                    HasSubstr("than that of rank 0")));
  EXPECT_THAT(findings["by hand"], HasSubstr("targets of rank 3"));
}

TEST(CallerErrors, TensorsOfABatchThatRequireGrad) {
  Findings findings;
  const std::map<std::string, Tensors Batch::*> members{
      {"inputs", &Batch::inputs}, {"targets", &Batch::targets}, {"extras", &Batch::extras}};
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches}, as_factory(layer));
    for (int step = 0; step < 2; ++step) {
      for (const auto& [name, member] : members) {
        Batch batch = random_batch(16, 3);
        (batch.*member).push_back(torch::ones({16, 2}, f64().requires_grad(true)) * 2);
        findings.note(name, [&] { pipe->step(batch, squared_error()); });
        findings.note(name + " by hand", [&] {
          pipe->step(Batch::from_micro_batches(split_batch(batch, kMicroBatches, 0)), squared_error());
        });
        if (name != "inputs") pipe->evaluate(batch, squared_error());
      }
      Batch asked = random_batch(16, 3);
      asked.inputs[0].set_requires_grad(comm->rank() == 0);
      if (step == 0) findings.note("asked by one", [&] { pipe->step(asked, squared_error()); });
      EXPECT_TRUE(pipe->step(random_batch(16, 3), squared_error()).input_gradients.empty());
    }
  });
  EXPECT_THAT(findings["inputs"],
              AllOf(HasSubstr("Batch::inputs[1] requires grad and was computed"), HasSubstr("detach()")));
  EXPECT_THAT(findings["inputs by hand"], HasSubstr("micro-batch 0: Batch::inputs[1] requires grad and was computed"));
  EXPECT_THAT(findings["asked by one"], HasSubstr("Batch::inputs of rank 1 has other sizes or values, or others that "
                                                  "require grad, than that of rank 0"));
  EXPECT_THAT(findings["targets"], HasSubstr("Batch::targets[1] requires grad"));
  EXPECT_THAT(findings["extras"], HasSubstr("Batch::extras[0] requires grad"));
  EXPECT_THAT(findings["extras by hand"], HasSubstr("micro-batch 0: Batch::extras[0] requires grad"));
}

// --- predict

/// Stages that hand on what they get; the last one returns what `last` makes of it.
StageFactory ending_in(const Compute& last) {
  return [last](int number) {
    return Stage().compute("piece", [last, number](const Tensors& inputs, const StageContext& context) {
      return number == kRanks - 1 ? last(inputs, context) : inputs;
    });
  };
}

TEST(CallerErrors, PredictionsThatCannotBeMerged) {
  const std::map<std::string, Compute> outputs{
      {"pooled", [](const Tensors& x, const StageContext&) { return Tensors{x[0].mean(0)}; }},
      {"scalar", [](const Tensors& x, const StageContext&) { return Tensors{x[0], x[0].sum()}; }},
      {"undefined", [](const Tensors& x, const StageContext&) { return Tensors{x[0], torch::Tensor()}; }},
      {"ragged", [](const Tensors& x,
                    const StageContext& context) { return Tensors{x[0].narrow(0, 0, 1 + context.micro_batch % 2)}; }},
      {"dtypes",
       [](const Tensors& x, const StageContext& context) {
         return Tensors{context.micro_batch == 5 ? x[0].to(torch::kFloat) : x[0]};
       }},
      {"numbers", [](const Tensors& x, const StageContext& context) {
         return context.micro_batch == 3 ? Tensors{x[0], x[0]} : Tensors{x[0]};
       }}};
  // [time, batch, features] with two samples in each of eight micro-batches.
  Batch batch;
  batch.inputs = {seeded({3, 16, 4}, 1)};
  const LossFn loss = [](const Tensors& tensors, const Tensors&) { return tensors[0].mean(); };
  for (const auto& [name, last] : outputs) {
    SCOPED_TRACE(name);
    Findings findings;
    run_ranks(kRanks, [&, &last_stage = last](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches, .batch_dim = 1, .keep_outputs = true},
                    ending_in(last_stage));
      for (int round = 0; round < 2; ++round) {
        findings.note("predict", [&] { pipe->predict(batch); });
        // The way out that the error names.
        const auto kept = pipe->evaluate(batch, loss).outputs;
        for (int m = 0; m < kMicroBatches && pipe->computes_loss(); ++m)
          EXPECT_EQ(kept[m].empty(), (m < kMicroBatches / 2) == (comm->rank() == 0));
      }
    });
    EXPECT_THAT(findings["predict"], AllOf(HasSubstr("cannot merge"), HasSubstr("keep_outputs")));
    const std::map<std::string, std::string> details{
        {"pooled", "has sizes [2, 4], but the micro-batch has 2 samples"},
        {"scalar", "output 1"},
        {"ragged", "micro-batch 1 is [float64 [2, 2, 4]], that of micro-batch 0 [float64 [1, 2, 4]]"}};
    const auto detail = details.find(name);
    EXPECT_THAT(findings["predict"], HasSubstr(detail == details.end() ? "" : detail->second));
  }
}

TEST(CallerErrors, PredictionsThatMerge) {
  const Batch batch = random_batch(16, 3);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches},
                  ending_in([](const Tensors& x, const StageContext&) { return Tensors{x[0].argmax(1), x[0] * 2}; }));
    // Uneven micro-batches, and one alone, whose outputs are what they are.
    const Batch uneven = Batch::from_micro_batches({random_batch(1, 5), random_batch(4, 6), random_batch(2, 7)});
    const Tensors whole = pipe->predict(batch), merged = pipe->predict(uneven);
    EXPECT_EQ(whole.empty(), !pipe->computes_loss());
    if (whole.empty()) return;
    EXPECT_TRUE(torch::equal(whole[0], batch.inputs[0].argmax(1)));
    EXPECT_TRUE(torch::equal(whole[1], batch.inputs[0] * 2));
    EXPECT_EQ(merged[0].sizes(), (std::vector<std::int64_t>{7}));
    EXPECT_TRUE(torch::equal(merged[1].narrow(0, 1, 4), uneven.micro_batches[1].inputs[0] * 2));
  });
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches},
                  ending_in([](const Tensors& x, const StageContext&) { return Tensors{x[0].sum()}; }));
    const Tensors sum = pipe->predict(Batch::from_micro_batches({batch}));
    if (sum.empty()) return;
    EXPECT_EQ(sum[0].item<double>(), batch.inputs[0].sum().item<double>());
  });
}

// --- clip_grad_norm_

TEST(CallerErrors, ClippingThatOneRankCannotDo) {
  struct Embedding : torch::nn::Module {
    Embedding() { weight = register_parameter("weight", seeded({10, kWidth}, 1)); }
    torch::Tensor weight;
  };
  Batch batch = random_batch(16, 3);
  batch.inputs = {torch::arange(16).remainder(10)};
  Findings findings;
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = kMicroBatches, .schedule = "1f1b"},
                  as_factory([](int stage) {
                    if (stage > 0) return layer(stage);
                    auto module = std::make_shared<Embedding>();
                    return Piece{module, [module](const Tensors& x) {
                                   return Tensors{at::embedding(module->weight, x[0], -1, false, /*sparse=*/true)};
                                 }};
                  }));
    pipe->step(batch, squared_error());
    Tensors before;
    for (const auto& parameter : pipe->parameters()) before.push_back(parameter.grad().clone());
    at::Tensor& gradient = pipe->parameters()[0].mutable_grad();
    const at::Tensor own = gradient;
    if (comm->rank() == 0) gradient = gradient.to_dense().to_sparse_csr();
    findings.note("layout", [&] { pipe->clip_grad_norm_(0.01); });
    gradient = own;
    findings.note("negative", [&] { pipe->clip_grad_norm_(comm->rank() == 1 ? -1.0 : 1.0); });
    std::size_t i = 0;
    for (const auto& parameter : pipe->parameters())
      EXPECT_TRUE(torch::equal(parameter.grad().to_dense(), before[i++].to_dense()));
    pipe->step(batch, squared_error());
    i = 0;
    for (const auto& parameter : pipe->parameters())
      EXPECT_LE(difference(parameter.grad().to_dense(), 2 * before[i++].to_dense()), 1e-12);
    // Sparse gradients are clipped as they are.
    const double norm = pipe->clip_grad_norm_(1e-3).item<double>();
    EXPECT_EQ(pipe->parameters()[0].grad().is_sparse(), comm->rank() == 0);
    double squares = 0, clipped = 0;
    for (std::size_t each = 0; each < before.size(); ++each) {
      squares += (2 * before[each].to_dense()).square().sum().item<double>();
      clipped += pipe->parameters()[each].grad().to_dense().square().sum().item<double>();
    }
    const auto all = torch::tensor({squares, clipped}, torch::kDouble);
    comm->all_reduce({all}).wait();
    EXPECT_NEAR(norm, std::sqrt(all[0].item<double>()), 1e-9 * norm);
    EXPECT_NEAR(std::sqrt(all[1].item<double>()), 1e-3, 1e-6);
  });
  EXPECT_THAT(findings["layout"], AllOf(HasSubstr("rank 0: "), HasSubstr("dense"), HasSubstr("[10, 6]")));
  EXPECT_THAT(findings["negative"], AllOf(HasSubstr("rank 1: "), HasSubstr("-1")));
}

}  // namespace
}  // namespace dualpipe::test
