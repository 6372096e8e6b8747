// Runs that go on: resumed equals undisturbed bit for bit, whatever the optimizer; another layout goes on with the same
// losses; weights come from any safetensors checkpoint.
#include "dualpipe/train/checkpoint.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/train/learning_rate.hpp"
#include "dualpipe/train/safetensors.hpp"
#include "error_of.hpp"
#include "pipeline/noisy.hpp"
#include "temporary_folder.hpp"
#include "train/layered.hpp"

namespace dualpipe {
namespace {

namespace fs = std::filesystem;
namespace optim = torch::optim;
using test::layered_pipe;
using test::train;
using test::Whole;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

using MakeOptimizer = std::function<std::unique_ptr<optim::Optimizer>(std::vector<at::Tensor>)>;

template <class Kind, class Options>
MakeOptimizer maker(Options options) {
  return
      [options](std::vector<at::Tensor> parameters) { return std::make_unique<Kind>(std::move(parameters), options); };
}

const std::vector<std::pair<std::string, MakeOptimizer>>& optimizers() {
  static const std::vector<std::pair<std::string, MakeOptimizer>> all{
      {"SGD", maker<optim::SGD>(optim::SGDOptions(0.1).momentum(0.9).nesterov(true))},
      {"SGD without momentum", maker<optim::SGD>(optim::SGDOptions(0.1))},
      {"Adam", maker<optim::Adam>(optim::AdamOptions(1e-2).amsgrad(true))},
      {"AdamW", maker<optim::AdamW>(optim::AdamWOptions(1e-2).betas({0.8, 0.95}))},
      {"Adagrad", maker<optim::Adagrad>(optim::AdagradOptions(1e-2).lr_decay(0.1))},
      {"RMSprop", maker<optim::RMSprop>(optim::RMSpropOptions(1e-3).momentum(0.5).centered(true))}};
  return all;
}
std::unique_ptr<optim::Optimizer> adamw(std::vector<at::Tensor> parameters) {
  return std::make_unique<optim::AdamW>(std::move(parameters), optim::AdamWOptions(1e-2));
}
void set_learning_rate(optim::Optimizer& optimizer, double rate) {
  for (auto& group : optimizer.param_groups()) group.options().set_lr(rate);
}

TEST(Checkpoint, ResumedEqualsUndisturbedBitForBitInOneProcess) {
  for (const auto& [name, make] : optimizers()) {
    SCOPED_TRACE(name);
    const test::TemporaryFolder folder;
    Whole undisturbed;
    const auto optimizer = make(undisturbed->parameters());
    train(undisturbed, *optimizer, 1, 3);
    set_learning_rate(*optimizer, 0.003);
    save_checkpoint(folder.path(), undisturbed, *optimizer, {.step = 3});
    const std::vector<double> losses = train(undisturbed, *optimizer, 4, 6);

    Whole resumed;
    test::scramble(*resumed);
    const auto other = make(resumed->parameters());
    train(resumed, *other, 7, 8);  // its states are forgotten as well
    EXPECT_EQ(load_checkpoint(folder.path(), resumed, *other).step, 3);
    EXPECT_EQ(other->param_groups()[0].options().get_lr(), 0.003);
    EXPECT_EQ(train(resumed, *other, 4, 6), losses);
    test::expect_same_weights(*resumed, test::weights_of(*undisturbed));
  }
}

TEST(Checkpoint, ResumedEqualsUndisturbedBitForBitOnRanks) {
  for (const std::string kind : {"dualpipe", "dualpipev", "1f1b"}) {
    SCOPED_TRACE(kind);
    const test::TemporaryFolder folder;
    run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
      DualPipe pipe = layered_pipe(comm, kind);
      const auto optimizer = adamw(pipe->parameters());
      train(pipe, *optimizer, 1, 2);
      save_checkpoint(folder.path(), pipe, *optimizer, {.step = 2});
      const std::vector<double> losses = train(pipe, *optimizer, 3, 5);

      DualPipe resumed = layered_pipe(comm, kind);
      test::scramble(*resumed);
      const auto other = adamw(resumed->parameters());
      EXPECT_EQ(load_checkpoint(folder.path(), resumed, *other).step, 2);
      EXPECT_EQ(train(resumed, *other, 3, 5), losses);
      test::expect_same_weights(*resumed, test::weights_of(*pipe));
    });
  }
}

/// With dropout, a learning rate that changes, and clipping.
TEST(Checkpoint, ResumedEqualsUndisturbedWithRandomNumbers) {
  const test::TemporaryFolder folder;
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    const auto make = [&](const std::string& kind) {
      return DualPipe(comm, {.num_micro_batches = 8, .schedule = kind, .seed = test::kNoisySeed},
                      split(test::noisy_layers(true), kind == "zbv" ? 8 : 4));
    };
    const auto go = [](DualPipe& pipe, optim::Optimizer& optimizer, int first, int last) {
      std::vector<double> losses;
      for (int step = first; step < last; ++step) {
        dualpipe::set_learning_rate(optimizer, cosine({.peak = 0.01, .warm_up_steps = 3, .steps = 8}, step));
        optimizer.zero_grad();
        losses.push_back(pipe->step(test::noisy_batch(8, step), test::squared_error()).loss.item<double>());
        pipe->clip_grad_norm_(0.5);
        optimizer.step();
      }
      return losses;
    };
    DualPipe pipe = make("dualpipe");
    const auto optimizer = adamw(pipe->parameters());
    go(pipe, *optimizer, 0, 3);
    save_checkpoint(folder.path(), pipe, *optimizer, {.step = 3});
    const std::vector<double> losses = go(pipe, *optimizer, 3, 6);

    DualPipe resumed = make("dualpipe");
    const auto other = adamw(resumed->parameters());
    EXPECT_EQ(go(resumed, *other, static_cast<int>(load_checkpoint(folder.path(), resumed, *other).step), 6), losses);
    test::expect_same_weights(*resumed, test::weights_of(*pipe));

    DualPipe elsewhere = make("zbv");
    const auto third = adamw(elsewhere->parameters());
    load_checkpoint(folder.path(), elsewhere, *third);
    const std::vector<double> found = go(elsewhere, *third, 3, 6);
    for (std::size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(found[i], losses[i], 1e-10);
  });
}

TEST(Checkpoint, AnotherLayoutGoesOnWithTheSameLosses) {
  const test::TemporaryFolder folder;
  std::mutex mutex;
  std::vector<double> losses;
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = layered_pipe(comm, "dualpipe");
    const auto optimizer = adamw(pipe->parameters());
    train(pipe, *optimizer, 1, 3);
    save_checkpoint(folder.path(), pipe, *optimizer, {.step = 3});
    const auto found = train(pipe, *optimizer, 4, 8);
    const std::lock_guard lock(mutex);
    losses = found;
  });
  const auto expect_losses = [&](const std::vector<double>& found) {
    ASSERT_EQ(found.size(), losses.size());
    for (std::size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(found[i], losses[i], 1e-10) << "step " << 4 + i;
  };
  run_ranks(2, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = layered_pipe(comm, "1f1b");
    test::scramble(*pipe);
    const auto optimizer = adamw(pipe->parameters());
    load_checkpoint(folder.path(), pipe, *optimizer);
    expect_losses(train(pipe, *optimizer, 4, 8));
  });
  Whole model;
  test::scramble(*model);
  const auto optimizer = adamw(model->parameters());
  load_checkpoint(folder.path(), model, *optimizer);
  expect_losses(train(model, *optimizer, 4, 8));
}

TEST(Checkpoint, AModuleOfOneProcessGoesOnInAPipeline) {
  const test::TemporaryFolder folder;
  Whole model;
  const auto optimizer = adamw(model->parameters());
  train(model, *optimizer, 1, 2);
  save_checkpoint(folder.path(), model, *optimizer, {.step = 2});
  const std::vector<double> losses = train(model, *optimizer, 3, 4);
  run_ranks(2, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = layered_pipe(comm, "zbv");
    const auto other = adamw(pipe->parameters());
    load_checkpoint(folder.path(), pipe, *other);
    const auto found = train(pipe, *other, 3, 4);
    for (std::size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(found[i], losses[i], 1e-10);
  });
}

TEST(Checkpoint, FilesAreAsHuggingFaceHasThem) {
  const test::TemporaryFolder folder;
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = layered_pipe(comm, "dualpipe");
    const auto optimizer = adamw(pipe->parameters());
    train(pipe, *optimizer, 1, 1);
    save_checkpoint(folder.path(), pipe, *optimizer, {.step = 1});
  });
  const fs::path step = folder / "step-00000001";
  std::vector<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(step))
    if (entry.is_regular_file()) files.push_back(fs::relative(entry.path(), step).string());
  EXPECT_THAT(
      files, ::testing::UnorderedElementsAre("manifest.json", "model.safetensors.index.json", "stage-00000.safetensors",
                                             "stage-00001.safetensors", "stage-00002.safetensors",
                                             "stage-00003.safetensors", "optimizer/optimizer.safetensors.index.json",
                                             "optimizer/stage-00000.safetensors", "optimizer/stage-00001.safetensors",
                                             "optimizer/stage-00002.safetensors", "optimizer/stage-00003.safetensors",
                                             "random/rank-00000.safetensors", "random/rank-00001.safetensors",
                                             "random/rank-00002.safetensors", "random/rank-00003.safetensors"));
  std::ifstream in(step / "model.safetensors.index.json");
  const std::string index{std::istreambuf_iterator<char>(in), {}};
  const int bytes = test::kLayers * (test::kWidth * test::kWidth + test::kWidth) * 8;
  EXPECT_THAT(index, AllOf(HasSubstr("\"total_size\": " + std::to_string(bytes)),
                           HasSubstr(R"("layers.7.bias": "stage-00003.safetensors")")));
  const SafetensorsFile states((step / "optimizer/stage-00001.safetensors").string());
  EXPECT_EQ(states.read("layers.2.weight.step").item<int>(), 1);
  EXPECT_EQ(states.tensors().at("layers.3.bias.exp_avg_sq").sizes, std::vector<std::int64_t>{test::kWidth});
}

TEST(Checkpoint, ExtraValuesAndTensorsComeBack) {
  const test::TemporaryFolder folder;
  Whole model;
  const auto optimizer = adamw(model->parameters());
  const CheckpointExtra extra{.step = 7,
                              .values = {{"epoch", std::int64_t{3}},
                                         {"best", 0.1},
                                         {"whole", 2.0},
                                         {"least", std::numeric_limits<std::int64_t>::min()},
                                         {"text", std::string("ä\n\"")}},
                              .tensors = {{"order", torch::randperm(5)}}};
  save_checkpoint(folder.path(), model, *optimizer, extra);
  const CheckpointExtra found = load_checkpoint(folder.path(), model, *optimizer);
  EXPECT_EQ(found.step, 7);
  EXPECT_EQ(found.values, extra.values);
  EXPECT_TRUE(torch::equal(found.tensors.at("order"), extra.tensors.at("order")));
}

TEST(Checkpoint, TheRandomStateComesBack) {
  const test::TemporaryFolder folder;
  Whole model;
  const auto optimizer = adamw(model->parameters());
  torch::manual_seed(5);
  torch::rand({3});
  save_checkpoint(folder.path(), model, *optimizer);
  const at::Tensor next = torch::rand({4});
  torch::manual_seed(6);
  load_checkpoint(folder.path(), model, *optimizer);
  EXPECT_TRUE(torch::equal(torch::rand({4}), next));
}

TEST(Checkpoint, ParametersWithoutStateAndFrozenOnesHaveNone) {
  const test::TemporaryFolder folder;
  Whole model;
  model->layers[0]->weight.requires_grad_(false);
  const auto optimizer = adamw({model->layers[1]->weight, model->layers[2]->weight});
  model->layers[1]->weight.mutable_grad() = torch::ones_like(model->layers[1]->weight);
  optimizer->step();
  save_checkpoint(folder.path(), model, *optimizer);
  model->layers[2]->weight.mutable_grad() = torch::ones_like(model->layers[1]->weight);
  optimizer->step();
  EXPECT_EQ(optimizer->state().size(), 2u);
  load_checkpoint(folder.path(), model, *optimizer);
  EXPECT_EQ(optimizer->state().size(), 1u);
  EXPECT_TRUE(optimizer->state().count(model->layers[1]->weight.unsafeGetTensorImpl()) == 1);
}

TEST(Checkpoint, ParameterGroupsKeepTheirOptions) {
  const test::TemporaryFolder folder;
  const auto grouped = [](Whole& model, double first, double second) {
    std::vector<at::Tensor> weights, biases;
    for (const auto& layer : model->layers) {
      weights.push_back(layer->weight);
      biases.push_back(layer->bias);
    }
    std::vector<optim::OptimizerParamGroup> groups;
    groups.emplace_back(weights, std::make_unique<optim::AdamWOptions>(first));
    groups.emplace_back(biases, std::make_unique<optim::AdamWOptions>(second));
    return std::make_unique<optim::AdamW>(groups);
  };
  Whole model;
  const auto optimizer = grouped(model, 0.25, 0.5);
  save_checkpoint(folder.path(), model, *optimizer);
  const auto other = grouped(model, 0.1, 0.1);
  load_checkpoint(folder.path(), model, *other);
  EXPECT_EQ(other->param_groups()[0].options().get_lr(), 0.25);
  EXPECT_EQ(other->param_groups()[1].options().get_lr(), 0.5);

  std::vector<optim::OptimizerParamGroup> swapped;
  swapped.emplace_back(optimizer->param_groups()[1].params());
  swapped.emplace_back(optimizer->param_groups()[0].params());
  optim::AdamW wrong(swapped, optim::AdamWOptions(0.1));
  EXPECT_THAT(test::error_of([&] { load_checkpoint(folder.path(), model, wrong); }),
              AllOf(HasSubstr("other parameter groups"), HasSubstr("layers.0.bias")));
  EXPECT_THAT(test::error_of([&] { load_checkpoint(folder.path(), model, *adamw(model->parameters())); }),
              AllOf(HasSubstr("2 parameter groups"), HasSubstr("it has 1")));
}

TEST(Checkpoint, WeightsThatStagesShareComeBackAsOne) {
  const test::TemporaryFolder folder;
  // DualPipe keeps the first and the last stage on the same ranks.
  const auto tied = [](const std::shared_ptr<Communicator>& comm) {
    const auto shared = std::make_shared<test::Layer>(0);
    return DualPipe(comm, {.num_micro_batches = 4}, [shared, last = comm->size() - 1](int stage) -> Stage {
      test::Layer layer = stage == 0 || stage == last ? *shared : test::Layer(stage);
      auto holder = std::make_shared<torch::nn::Module>("Stage");
      holder->register_module(stage == last ? "head" : "layer" + std::to_string(stage), layer.ptr());
      return Stage(holder).compute("layer", [layer](const torch::Tensor& x) mutable { return layer->forward(x); });
    });
  };
  run_ranks(2, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = tied(comm);
    const auto optimizer = adamw(pipe->parameters());
    train(pipe, *optimizer, 1, 2);
    save_checkpoint(folder.path(), pipe, *optimizer, {.step = 2});
    const std::vector<double> losses = train(pipe, *optimizer, 3, 4);
    DualPipe resumed = tied(comm);
    test::scramble(*resumed);
    const auto other = adamw(resumed->parameters());
    load_checkpoint(folder.path(), resumed, *other);
    EXPECT_EQ(train(resumed, *other, 3, 4), losses);
  });
  const SafetensorsFile first((folder / "step-00000002/stage-00000.safetensors").string());
  const SafetensorsFile last((folder / "step-00000002/stage-00001.safetensors").string());
  EXPECT_TRUE(torch::equal(first.read("layer0.weight"), last.read("head.weight")));
}

/// One process has the weight under both names, a pipeline on one rank or on two: it is saved once, and found by all.
TEST(Checkpoint, AWeightThatStagesTieIsSavedOnceAndGoesOnInAnyLayout) {
  const auto make_all = [](const std::shared_ptr<Communicator>& comm, const std::string& kind) {
    const test::Layer shared(0);
    std::vector<NamedLayer> layers = test::layered_layers();
    layers.front().make =
        layers.back().make = [shared] { return as_stage(shared).tie("weight", "w").tie("bias", "b"); };
    const int stages = kind == "zbv" || kind == "interleaved" ? 2 * comm->size() : comm->size();
    return DualPipe(comm, {.num_micro_batches = 8, .schedule = kind}, split(std::move(layers), stages));
  };
  const auto whole = [] {
    Whole model;
    const auto level = model->named_children()["layers"];
    model->layers.back() = model->layers.front();
    level->replace_module(std::to_string(test::kLayers - 1), model->layers.front().ptr());
    return model;
  };
  // The parameters of a module come twice where it has two names for them.
  const auto once = [](Whole& model) {
    std::vector<at::Tensor> parameters = model->parameters();
    parameters.resize(parameters.size() - 2);
    return parameters;
  };
  Whole model = whole();
  const auto optimizer = adamw(once(model));
  const test::TemporaryFolder of_module;
  train(model, *optimizer, 1, 2);
  save_checkpoint(of_module.path(), model, *optimizer, {.step = 2});
  const std::vector<double> losses = train(model, *optimizer, 3, 6);
  const auto expect_losses = [&](const std::vector<double>& found, int first) {
    for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], losses[first - 3 + i], 1e-10);
  };
  const test::TemporaryFolder of_1f1b;
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = make_all(comm, "1f1b");
    test::scramble(*pipe);
    const auto other = adamw(pipe->parameters());
    load_checkpoint(of_module.path(), pipe, *other);
    expect_losses(train(pipe, *other, 3, 3), 3);
    save_checkpoint(of_1f1b.path(), pipe, *other, {.step = 3});
    EXPECT_EQ(pipe->tied_names("stage3.layers.7.bias"),
              comm->rank() == 3 ? (std::vector<std::string>{"stage0.layers.0.bias", "stage3.layers.7.bias"})
                                : (std::vector<std::string>{"stage3.layers.7.bias"}));
  });
  const std::string index = detail::read_file((of_1f1b / "step-00000003/model.safetensors.index.json").string());
  EXPECT_THAT(index, AllOf(HasSubstr("layers.0.weight"), Not(HasSubstr("layers.7.weight"))));
  for (const std::string kind : {"dualpipe", "interleaved", "1f1b", "zbv"}) {
    SCOPED_TRACE(kind);
    run_ranks(2, [&](const std::shared_ptr<Communicator>& comm) {
      DualPipe pipe = make_all(comm, kind);
      test::scramble(*pipe);
      const auto other = adamw(pipe->parameters());
      load_checkpoint(of_1f1b.path(), pipe, *other);
      expect_losses(train(pipe, *other, 4, 5), 4);
    });
  }
  Whole last = whole();
  test::scramble(*last);
  const auto other = adamw(once(last));
  load_checkpoint(of_1f1b.path(), last, *other);
  expect_losses(train(last, *other, 4, 6), 4);
}

TEST(CheckpointWriter, KeepsTheLastAndReplacesTheSameStep) {
  const test::TemporaryFolder folder;
  const auto names = [&] {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder.path())) found.push_back(entry.path().filename().string());
    std::sort(found.begin(), found.end());
    return found;
  };
  Whole model;
  const auto optimizer = adamw(model->parameters());
  CheckpointWriter writer(folder.path(), {.keep = 2});
  for (const std::int64_t step : {1, 5, 5, 30}) writer.save(model, *optimizer, {.step = step});
  EXPECT_THAT(names(), ElementsAre("step-00000005", "step-00000030"));
  test::scramble(*model);
  writer.save(model, *optimizer, {.step = 30});
  EXPECT_THAT(names(), ElementsAre("step-00000005", "step-00000030"));
  Whole loaded;
  load_checkpoint(folder.path(), loaded, *adamw(loaded->parameters()));
  test::expect_same_weights(*loaded, test::weights_of(*model));
  EXPECT_EQ(load_checkpoint(folder / "step-00000005", loaded, *adamw(loaded->parameters())).step, 5);
}

TEST(CheckpointWriter, InTheBackgroundItWritesWhatWasThereAtTheCall) {
  const test::TemporaryFolder folder;
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = layered_pipe(comm, "dualpipe");
    const auto optimizer = adamw(pipe->parameters());
    CheckpointWriter writer(folder.path(), {.keep = 1, .asynchronous = true});
    std::vector<double> losses;
    for (int step = 1; step <= 4; ++step) {
      train(pipe, *optimizer, step, step);
      writer.save(pipe, *optimizer, {.step = step, .tensors = {{"step", torch::tensor(step)}}});
    }
    losses = train(pipe, *optimizer, 5, 6);
    writer.wait();
    writer.wait();  // nothing is left to wait for
    DualPipe resumed = layered_pipe(comm, "dualpipe");
    test::scramble(*resumed);
    const auto other = adamw(resumed->parameters());
    const CheckpointExtra extra = load_checkpoint(folder.path(), resumed, *other);
    EXPECT_EQ(extra.step, 4);
    EXPECT_EQ(extra.tensors.at("step").item<int>(), 4);
    EXPECT_EQ(train(resumed, *other, 5, 6), losses);
  });
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
}

TEST(CheckpointWriter, InTheBackgroundItIsCompleteWithoutAnotherCall) {
  const test::TemporaryFolder folder;
  run_ranks(2, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = layered_pipe(comm, "1f1b");
    const auto optimizer = adamw(pipe->parameters());
    CheckpointWriter writer(folder.path(), {.asynchronous = true});
    writer.save(pipe, *optimizer, {.step = 9});
    while (!fs::exists(folder / "step-00000009/manifest.json"))  // the test's timeout ends it
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    comm->barrier().wait();
    EXPECT_EQ(load_checkpoint(folder.path(), pipe, *optimizer).step, 9);
    writer.wait();
  });
}

TEST(LoadWeights, AnyCheckpointThroughAMapOfNames) {
  const test::TemporaryFolder folder;
  std::map<std::string, at::Tensor> first, second;
  std::string index;
  for (int number = 0; number < test::kLayers; ++number)
    for (const std::string kind : {"weight", "bias"}) {
      const std::string name = "model.h." + std::to_string(number) + "." + kind;
      const std::vector<std::int64_t> sizes(kind == "bias" ? 1 : 2, test::kWidth);
      (number < 3 ? first : second)[name] = torch::randn(sizes).to(at::kBFloat16);
      index += (index.empty() ? "\"" : ", \"") + name + "\": \"" + (number < 3 ? "a" : "b") + ".safetensors\"";
    }
  second["lm_head"] = torch::ones({1});
  write_safetensors((folder / "a.safetensors").string(), first);
  write_safetensors((folder / "b.safetensors").string(), second);
  folder.write("model.safetensors.index.json", R"({"metadata": {}, "weight_map": {)" + index + "}}");
  const LoadWeightsOptions options{
      .file_name = [](const std::string& name) { return "model.h." + name.substr(std::string("layers.").size()); }};
  first.merge(second);
  run_ranks(2, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = layered_pipe(comm, "dualpipe");
    load_weights(folder.path(), pipe, options);
    for (const auto& child : pipe->named_children())
      for (const auto& item : child.value()->named_parameters())
        EXPECT_TRUE(torch::equal(item.value(), first.at(options.file_name(item.key())).to(at::kDouble))) << item.key();
  });
  Whole model;
  const auto before = test::weights_of(*model);
  EXPECT_THAT(
      test::error_of([&] { load_weights((folder / "b.safetensors").string(), model, options); }),
      AllOf(HasSubstr("missing are layers.0.bias (model.h.0.bias in the file)"), HasSubstr("does not have lm_head")));
  test::expect_same_weights(*model, before);
  load_weights((folder / "b.safetensors").string(), model,
               {.file_name = [](const std::string& name) { return name == "layers.7.bias" ? "model.h.7.bias" : ""; },
                .allow_unused = true});
  EXPECT_TRUE(torch::equal(model->layers[7]->bias, first.at("model.h.7.bias").to(at::kDouble)));
  EXPECT_TRUE(torch::equal(model->layers[6]->bias, before.at("layers.6.bias")));
}

TEST(LoadWeights, OfARunWithoutItsOptimizer) {
  const test::TemporaryFolder folder;
  Whole model;
  const auto optimizer = adamw(model->parameters());
  train(model, *optimizer, 1, 1);
  save_checkpoint(folder.path(), model, *optimizer, {.step = 1});
  const auto expected = test::weights_of(*model);
  test::scramble(*model);
  load_weights(folder.path(), model);
  test::expect_same_weights(*model, expected);
  EXPECT_THAT(test::error_of([&] { load_weights(folder / "step-00000001/random", model); }), HasSubstr("no weights"));
}

}  // namespace
}  // namespace dualpipe
