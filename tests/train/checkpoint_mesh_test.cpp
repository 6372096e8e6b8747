// Checkpoints of several pipelines that train one model: one folder, whoever holds what, for every layout.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/train/checkpoint.hpp"
#include "dualpipe/train/learning_rate.hpp"
#include "dualpipe/train/safetensors.hpp"
#include "dualpipe/train/sharded_optimizer.hpp"
#include "error_of.hpp"
#include "temporary_folder.hpp"
#include "train/layered.hpp"
#include "train/seeded_run.hpp"

namespace dualpipe {
namespace {

namespace fs = std::filesystem;
namespace optim = torch::optim;
using test::error_of;
using test::failure_on_all;
using test::Whole;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

std::vector<std::string> files_in(const fs::path& folder) {
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.is_regular_file()) files.push_back(entry.path().filename().string());
  return files;
}

/// Names of all tensors in the files of a folder: each is in one of them.
std::vector<std::string> tensors_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const std::string& file : files_in(folder)) {
    if (!file.ends_with(".safetensors")) continue;
    const SafetensorsFile tensors((folder / file).string());
    for (const auto& [name, entry] : tensors.tensors()) names.push_back(name);
  }
  return names;
}

// --- a run that goes on in another layout

constexpr int kRows = 32;

/// A step as a run has it: a learning rate that changes, clipping, AdamW.
template <class Clip, class Step>
double scheduled_step(optim::Optimizer& optimizer, int step, const Step& forward_and_backward, const Clip& clip) {
  set_learning_rate(optimizer, cosine({.peak = 2e-2, .warm_up_steps = 3, .steps = 9}, step));
  optimizer.zero_grad();
  const double loss = forward_and_backward();
  EXPECT_GT(clip(0.05), 0.05);
  optimizer.step();
  return loss;
}

Batch rows_of(int step, int replica, int num_replicas) {
  const Batch all = test::random_batch(kRows, 100 * static_cast<std::uint64_t>(step));
  return {.inputs = {all.inputs[0].chunk(num_replicas)[replica]},
          .targets = {all.targets[0].chunk(num_replicas)[replica]}};
}

std::vector<double> train_pipe(DualPipe& pipe, optim::Optimizer& optimizer, const Mesh& mesh, int first, int last) {
  std::vector<double> losses;
  for (int step = first; step < last; ++step)
    losses.push_back(scheduled_step(
        optimizer, step,
        [&] {
          const Batch batch = rows_of(step, mesh.replica(), mesh.num_replicas());
          return pipe->step(batch, test::squared_error()).loss.item<double>();
        },
        [&](double most) { return pipe->clip_grad_norm_(most).item<double>(); }));
  return losses;
}

DualPipe pipe_of(const Mesh& mesh, const std::string& kind) {
  const int micro_batches = kRows / mesh.num_replicas(), ranks = mesh.pipeline()->size();
  return DualPipe(mesh,
                  {.num_micro_batches = micro_batches, .schedule = kind, .chunks_per_rank = test::kLayers / ranks},
                  split(test::layered_layers(), kind == "1f1b" ? ranks : test::kLayers));
}

TEST(CheckpointMesh, ARunOfTwoReplicasGoesOnInEveryLayout) {
  const test::TemporaryFolder folder;
  constexpr int kSaved = 3, kSteps = 8;
  std::vector<double> losses;
  run_ranks(16, [&](const std::shared_ptr<Communicator>& comm) {
    const Mesh mesh(comm, {.pipeline = 8, .data = 2});
    DualPipe pipe = pipe_of(mesh, "dualpipe");
    EXPECT_EQ(pipe->world(), comm);
    EXPECT_EQ(pipe->communicator(), mesh.pipeline());
    optim::AdamW optimizer(pipe->parameters(), optim::AdamWOptions(1.0));
    train_pipe(pipe, optimizer, mesh, 0, kSaved);
    save_checkpoint(folder.path(), pipe, optimizer, {.step = kSaved});
    const auto found = train_pipe(pipe, optimizer, mesh, kSaved, kSteps);
    if (comm->rank() == 0) losses = found;
  });
  const fs::path checkpoint = folder / "step-00000003";
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
  EXPECT_EQ(tensors_in(checkpoint).size(), 2u * test::kLayers);
  EXPECT_EQ(tensors_in(checkpoint / "optimizer").size(), 6u * test::kLayers);
  EXPECT_EQ(files_in(checkpoint / "random").size(), 16u);

  const auto expect_losses = [&](const std::vector<double>& found) {
    ASSERT_EQ(found.size(), losses.size());
    for (std::size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(found[i], losses[i], 1e-10) << "step " << kSaved + i;
  };
  const auto goes_on = [&](const std::string& kind, const MeshShape& shape) {
    SCOPED_TRACE(kind);
    run_ranks(shape.size(), [&](const std::shared_ptr<Communicator>& comm) {
      const Mesh mesh(comm, shape);
      DualPipe pipe = pipe_of(mesh, kind);
      test::scramble(*pipe);
      optim::AdamW optimizer(pipe->parameters(), optim::AdamWOptions(1.0));
      EXPECT_EQ(load_checkpoint(folder.path(), pipe, optimizer).step, kSaved);
      expect_losses(train_pipe(pipe, optimizer, mesh, kSaved, kSteps));
    });
  };
  goes_on("dualpipe", {.pipeline = 8, .data = 2});
  goes_on("dualpipev", {.pipeline = 4});
  goes_on("zbv", {.pipeline = 4});
  goes_on("interleaved", {.pipeline = 2});
  goes_on("1f1b", {.pipeline = 2, .data = 4, .order = MeshOrder::pipeline_fastest});

  Whole model;
  test::scramble(*model);
  optim::AdamW optimizer(model->parameters(), optim::AdamWOptions(1.0));
  load_checkpoint(folder.path(), model, optimizer);
  std::vector<double> found;
  for (int step = kSaved; step < kSteps; ++step)
    found.push_back(scheduled_step(
        optimizer, step,
        [&] {
          const Batch batch = rows_of(step, 0, 1);
          const at::Tensor loss = torch::mse_loss(model->forward(batch.inputs[0]), batch.targets[0]);
          loss.backward();
          return loss.item<double>();
        },
        [&](double most) { return torch::nn::utils::clip_grad_norm_(model->parameters(), most); }));
  expect_losses(found);
}

// --- experts

constexpr int kExperts = 4;

/// A layer with a parameter that all ranks of an expert group have, and some of its experts.
struct ExpertLayerImpl : torch::nn::Module {
  /// @param name_of  what the module calls an expert.
  ExpertLayerImpl(int first, int count, const std::function<int(int expert)>& name_of) {
    shared = register_module("shared", test::Layer(0));
    auto all = register_module("experts", std::make_shared<torch::nn::Module>("Experts"));
    for (int expert = first; expert < first + count; ++expert)
      experts.push_back(all->register_module(std::to_string(name_of(expert)), test::Layer(1 + expert)));
    all->register_buffer("used", torch::full({}, first, torch::kInt64));  // of a part, where the test says so
  }
  torch::Tensor forward(torch::Tensor x) {
    x = shared->forward(x);
    for (test::Layer& expert : experts) x = expert->forward(x);
    return x;
  }
  test::Layer shared{nullptr};
  std::vector<test::Layer> experts;
};
TORCH_MODULE(ExpertLayer);

bool is_expert(const std::string& name) { return name.find(".experts.") != std::string::npos; }
bool is_expert_parameter(const std::string& name) { return is_expert(name) && !name.ends_with("used"); }
int global_name(int expert) { return expert; }

/// Four layers, whose experts are spread over the ranks of an expert group.
DualPipe expert_pipe(const Mesh& mesh, const std::string& kind, const std::function<int(int expert)>& name_of,
                     const IsExpert& expert = is_expert_parameter) {
  const int count = kExperts / mesh.expert()->size(), first = mesh.expert()->rank() * count;
  std::vector<NamedLayer> layers;
  for (int number = 0; number < 4; ++number)
    layers.push_back(
        {"layers." + std::to_string(number), [=] { return as_stage(ExpertLayer(first, count, name_of)); }});
  const int stages = kind == "dualpipev" ? 2 * mesh.pipeline()->size() : mesh.pipeline()->size();
  return DualPipe(mesh, {.num_micro_batches = 4, .schedule = kind}, split(layers, stages), expert);
}

/// The same in one process.
std::shared_ptr<torch::nn::Module> whole_experts() {
  auto model = std::make_shared<torch::nn::Module>("Model");
  auto level = model->register_module("layers", std::make_shared<torch::nn::Module>("Layers"));
  for (int number = 0; number < 4; ++number)
    level->register_module(std::to_string(number), ExpertLayer(0, kExperts, global_name).ptr());
  return model;
}

/// What is behind "layers." of a name: the same in every layout.
std::map<std::string, at::Tensor> by_model_name(const torch::nn::Module& model) {
  std::map<std::string, at::Tensor> weights;
  for (const auto& [name, tensor] : test::weights_of(model)) weights[name.substr(name.find("layers."))] = tensor;
  return weights;
}

TEST(CheckpointMesh, ExpertsComeBackHoweverTheyAreSpread) {
  const test::TemporaryFolder folder;
  run_ranks(8, [&](const std::shared_ptr<Communicator>& comm) {
    const Mesh mesh(comm, {.pipeline = 2, .data = 4, .expert = 2});
    DualPipe pipe = expert_pipe(mesh, "dualpipe", global_name);
    EXPECT_EQ(pipe->expert_part("stage0.layers.0.experts.1.weight"), mesh.expert()->rank());
    EXPECT_EQ(pipe->expert_part("stage0.layers.0.shared.weight"), -1);
    optim::AdamW optimizer(pipe->parameters());
    test::seeded_step(*pipe, optimizer, 1);
    save_checkpoint(folder.path(), pipe, optimizer, {.step = 1});
  });
  // The second rank that writes tensors of a stage has a file of its own.
  EXPECT_THAT(
      files_in(folder / "step-00000001"),
      UnorderedElementsAre("manifest.json", "model.safetensors.index.json", "stage-00000.safetensors",
                           "stage-00000.1.safetensors", "stage-00001.safetensors", "stage-00001.1.safetensors"));
  EXPECT_EQ(tensors_in(folder / "step-00000001").size(), 4u * (2 * (1 + kExperts) + 1));

  const auto expected = whole_experts();
  optim::AdamW optimizer(expected->parameters());
  test::seeded_step(*expected, optimizer, 1);
  test::seeded_step(*expected, optimizer, 2);
  const auto weights = test::weights_of(*expected);
  const auto expect_next_step = [&](torch::nn::Module& model, optim::Optimizer& own) {
    test::seeded_step(model, own, 2);
    for (const auto& [name, tensor] : by_model_name(model))
      EXPECT_TRUE(test::same_bits(tensor, weights.at(name))) << name;
  };
  const auto loaded = whole_experts();
  test::scramble(*loaded);
  optim::AdamW own(loaded->parameters());
  EXPECT_EQ(load_checkpoint(folder.path(), *loaded, own).step, 1);
  expect_next_step(*loaded, own);
  for (const MeshShape shape : {MeshShape{.pipeline = 2, .data = 4, .expert = 4}, MeshShape{.pipeline = 2}}) {
    run_ranks(shape.size(), [&](const std::shared_ptr<Communicator>& comm) {
      const Mesh mesh(comm, shape);
      DualPipe pipe = expert_pipe(mesh, "dualpipev", global_name);
      test::scramble(*pipe);
      optim::AdamW of_rank(pipe->parameters());
      load_checkpoint(folder.path(), pipe, of_rank);
      expect_next_step(*pipe, of_rank);
    });
  }
}

TEST(CheckpointMesh, ExpertsUnderOneNameNeedAPrefix) {
  const test::TemporaryFolder folder;
  const auto local_name = [](int expert) { return expert % (kExperts / 2); };
  const MeshShape shape{.pipeline = 2, .data = 2, .expert = 2};
  EXPECT_THAT(failure_on_all(4,
                             [&](const auto& comm) {
                               const Mesh mesh(comm, shape);
                               DualPipe pipe = expert_pipe(mesh, "dualpipe", local_name);
                               optim::AdamW optimizer(pipe->parameters());
                               const std::string text =
                                   error_of([&] { save_checkpoint(folder.path(), pipe, optimizer); });
                               pipe->step(test::random_batch(8, 1), test::squared_error());  // it goes on
                               throw InvalidArgument(text);
                             }),
              AllOf(HasSubstr("ranks have different experts under one name: layers.0.experts.0.bias (ranks 0 and 1)"),
                    HasSubstr("by their numbers in the model"), HasSubstr("stage_prefix")));
  EXPECT_TRUE(fs::is_empty(folder.path()));

  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    const Mesh mesh(comm, shape);
    DualPipe pipe = expert_pipe(mesh, "dualpipe", local_name, is_expert);
    optim::AdamW optimizer(pipe->parameters());
    test::seeded_step(*pipe, optimizer, 1 + mesh.expert()->rank());
    pipe->broadcast_parameters();
    save_checkpoint(folder.path(), pipe, optimizer, {.step = 1}, {.stage_prefix = true});
    const auto expected = test::weights_of(*pipe);
    test::scramble(*pipe);
    for (const auto& buffer : pipe->buffers()) buffer.fill_(9);
    load_checkpoint(folder.path(), pipe, optimizer);
    test::expect_same_weights(*pipe, expected);
    for (const auto& buffer : pipe->buffers())
      EXPECT_EQ(buffer.item<int>(), mesh.expert()->rank() * kExperts / mesh.expert()->size());
  });
  EXPECT_THAT(tensors_in(folder / "step-00000001"), ::testing::Contains("stage1.part1.layers.2.experts.0.weight"));
}

// --- optimizers that have a part of the parameters

/// Which of the ranks that hold a stage has a parameter in its optimizer.
int owner_of(const std::string& name, int num_holders) {
  return static_cast<int>(std::hash<std::string>{}(name.substr(name.find("layers."))) % num_holders);
}

std::unique_ptr<optim::AdamW> with_groups(const std::vector<at::Tensor>& weights,
                                          const std::vector<at::Tensor>& biases) {
  std::vector<optim::OptimizerParamGroup> groups;
  groups.emplace_back(weights, std::make_unique<optim::AdamWOptions>(0.25));
  groups.emplace_back(biases, std::make_unique<optim::AdamWOptions>(0.5));
  return std::make_unique<optim::AdamW>(groups);
}

/// Weights and biases in two groups, of the parameters that `wanted` takes by their names.
std::unique_ptr<optim::AdamW> grouped(const torch::nn::Module& model,
                                      const std::function<bool(const std::string&)>& wanted) {
  std::vector<at::Tensor> weights, biases;
  for (const auto& item : model.named_parameters())
    if (wanted(item.key())) (item.key().ends_with("weight") ? weights : biases).push_back(item.value());
  return with_groups(weights, biases);
}
bool all_names(const std::string&) { return true; }

TEST(CheckpointMesh, EachRankBringsTheOptimizerStatesThatItHas) {
  const test::TemporaryFolder folder, other;
  Whole truth;
  const auto whole_optimizer = grouped(*truth, all_names);
  test::seeded_step(*truth, *whole_optimizer, 1);
  save_checkpoint(other.path(), truth, *whole_optimizer, {.step = 1});
  test::seeded_step(*truth, *whole_optimizer, 2);
  const auto expected = test::weights_of(*truth);

  const MeshShape shape{.pipeline = 2, .data = 2};
  const auto sharded = [&](DualPipe& pipe, int rank) {
    return grouped(*pipe, [rank](const std::string& name) { return owner_of(name, 4) == rank; });
  };
  std::mutex mutex;
  std::size_t states = 0;
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    const Mesh mesh(comm, shape);
    DualPipe pipe = test::layered_pipe(mesh, "dualpipe");  // every rank holds every stage
    const auto optimizer = sharded(pipe, comm->rank());
    // From one process; then each rank trains what it owns, as the others would learn from it.
    load_checkpoint(other.path(), pipe, *optimizer);
    EXPECT_EQ(optimizer->state().size(),
              optimizer->param_groups()[0].params().size() + optimizer->param_groups()[1].params().size());
    {
      const std::lock_guard lock(mutex);
      states += optimizer->state().size();
    }
    test::seeded_step(*pipe, *optimizer, 2);
    for (const auto& item : pipe->named_parameters())
      if (owner_of(item.key(), 4) == comm->rank()) {
        const std::string name = item.key().substr(item.key().find("layers."));
        EXPECT_TRUE(test::same_bits(item.value(), expected.at(name))) << name;
      } else {
        torch::NoGradGuard no_grad;
        item.value().copy_(expected.at(item.key().substr(item.key().find("layers."))));
      }
    save_checkpoint(folder.path(), pipe, *optimizer, {.step = 2});
  });
  EXPECT_EQ(states, 2u * test::kLayers);
  EXPECT_EQ(tensors_in(folder / "step-00000002/optimizer").size(), 6u * test::kLayers);

  test::seeded_step(*truth, *whole_optimizer, 3);
  Whole loaded;
  const auto optimizer = grouped(*loaded, all_names);
  load_checkpoint(folder.path(), loaded, *optimizer);
  EXPECT_EQ(optimizer->param_groups()[1].options().get_lr(), 0.5);
  test::seeded_step(*loaded, *optimizer, 3);
  test::expect_same_weights(*loaded, test::weights_of(*truth));
}

TEST(CheckpointMesh, AShardedRunGoesOnShardedOtherwiseAndUnsharded) {
  const test::TemporaryFolder folder;
  constexpr int kSaved = 2, kSteps = 6;
  const auto options = [](int micro_batches, const std::string& kind) {
    return DualPipeOptions{.num_micro_batches = micro_batches, .schedule = kind, .shard_optimizer = true};
  };
  std::vector<double> losses;
  const auto sharded_run = [&](const Mesh& mesh, const std::string& kind, int stages, bool load) {
    DualPipe pipe(mesh, options(kRows / mesh.num_replicas(), kind), split(test::layered_layers(), stages));
    ShardedOptimizer optimizer(pipe, std::make_unique<optim::AdamW>(pipe->owned_parameters()));
    std::vector<double> found;
    int step = 0;
    if (load) {
      test::scramble(*pipe);
      step = static_cast<int>(load_checkpoint(folder.path(), pipe, optimizer.optimizer()).step);
    }
    for (; step < kSteps; ++step) {
      if (step == kSaved && !load) save_checkpoint(folder.path(), pipe, optimizer.optimizer(), {.step = step});
      optimizer.zero_grad();
      set_learning_rate(optimizer.optimizer(), 1e-2 / (1 + step));
      const Batch batch = rows_of(step, mesh.replica(), mesh.num_replicas());
      const double loss = pipe->step(batch, test::squared_error()).loss.item<double>();
      pipe->clip_grad_norm_(0.05);
      optimizer.step();
      if (step >= kSaved) found.push_back(loss);
    }
    return found;
  };
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    const Mesh mesh(comm, {.pipeline = 2, .data = 2});
    const auto found = sharded_run(mesh, "dualpipe", 2, false);
    if (comm->rank() == 0) losses = found;
  });
  EXPECT_EQ(tensors_in(folder / "step-00000002/optimizer").size(), 6u * test::kLayers);
  const auto expect_losses = [&](const std::vector<double>& found) {
    ASSERT_EQ(found.size(), losses.size());
    for (std::size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(found[i], losses[i], 1e-10) << i;
  };
  run_ranks(4, [&](const std::shared_ptr<Communicator>& comm) {
    expect_losses(sharded_run(Mesh(comm, {.pipeline = 4}), "dualpipev", 8, true));
  });
  Whole model;
  test::scramble(*model);
  optim::AdamW optimizer(model->parameters());
  load_checkpoint(folder.path(), model, optimizer);
  std::vector<double> found;
  for (int step = kSaved; step < kSteps; ++step) {
    optimizer.zero_grad();
    set_learning_rate(optimizer, 1e-2 / (1 + step));
    const Batch batch = rows_of(step, 0, 1);
    const at::Tensor loss = torch::mse_loss(model->forward(batch.inputs[0]), batch.targets[0]);
    loss.backward();
    torch::nn::utils::clip_grad_norm_(model->parameters(), 0.05);
    optimizer.step();
    found.push_back(loss.item<double>());
  }
  expect_losses(found);
}

TEST(CheckpointMesh, OptimizersThatDoNotFitTogetherAreOneError) {
  const test::TemporaryFolder folder, saved;
  Whole whole;
  const auto optimizer_of_all = grouped(*whole, all_names);
  test::seeded_step(*whole, *optimizer_of_all, 1);
  save_checkpoint(saved.path(), whole, *optimizer_of_all, {.step = 1});

  const auto failure = [&](const std::function<std::unique_ptr<optim::AdamW>(DualPipe&, int rank)>& make, bool load) {
    return failure_on_all(4, [&](const auto& comm) {
      const Mesh mesh(comm, {.pipeline = 2, .data = 2});
      DualPipe pipe = test::layered_pipe(mesh, "dualpipe");
      const auto optimizer = make(pipe, comm->rank());
      const auto before = test::weights_of(*pipe);
      const std::string text = error_of([&] {
        if (load)
          load_checkpoint(saved.path(), pipe, *optimizer);
        else
          save_checkpoint(folder.path(), pipe, *optimizer);
      });
      test::expect_same_weights(*pipe, before);
      EXPECT_TRUE(optimizer->state().empty());
      pipe->step(test::random_batch(2 * test::kMicroBatches, 1), test::squared_error());
      throw InvalidArgument(text);
    });
  };
  const auto swapped_on_rank_2 = [](DualPipe& pipe, int rank) {
    auto optimizer = grouped(*pipe, all_names);
    if (rank != 2) return optimizer;
    return with_groups(optimizer->param_groups()[1].params(), optimizer->param_groups()[0].params());
  };
  for (const bool load : {false, true})
    EXPECT_THAT(failure(swapped_on_rank_2, load), AllOf(HasSubstr("one parameter in different groups"),
                                                        HasSubstr("layers.0.bias (1 on rank 0, 0 on rank 2)")));
  const auto one_group_on_rank_3 = [](DualPipe& pipe, int rank) {
    return rank == 3 ? std::make_unique<optim::AdamW>(pipe->parameters()) : grouped(*pipe, all_names);
  };
  EXPECT_THAT(failure(one_group_on_rank_3, false), AllOf(HasSubstr("ranks disagree"), HasSubstr("rank 3")));
  const auto only_weights_on_rank_3 = [](DualPipe& pipe, int rank) {
    auto optimizer = grouped(*pipe, all_names);
    return rank == 3 ? std::make_unique<optim::AdamW>(optimizer->param_groups()[0].params()) : std::move(optimizer);
  };
  EXPECT_THAT(failure(only_weights_on_rank_3, true),
              AllOf(HasSubstr("rank 3: the checkpoint is of an optimizer with 2"), HasSubstr("it has 1")));
  // No rank trains one of the parameters that have states.
  const auto without_one = [](DualPipe& pipe, int rank) {
    return grouped(*pipe, [rank](const std::string& name) {
      return owner_of(name, 4) == rank && !name.ends_with("layers.3.bias");
    });
  };
  EXPECT_THAT(failure(without_one, true), AllOf(HasSubstr("does not train"), HasSubstr("layers.3.bias.exp_avg")));
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

}  // namespace
}  // namespace dualpipe
