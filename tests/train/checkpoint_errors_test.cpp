// What a checkpoint cannot do is one error on all ranks, and leaves old checkpoints and the model as they were.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <torch/torch.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/train/checkpoint.hpp"
#include "dualpipe/train/safetensors.hpp"
#include "error_of.hpp"
#include "temporary_folder.hpp"
#include "train/layered.hpp"

namespace dualpipe {
namespace {

namespace fs = std::filesystem;
namespace optim = torch::optim;
using test::error_of;
using test::failure_on_all;
using test::layered_pipe;
using test::train;
using test::Whole;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

void overwrite(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

/// A run of two steps in one process, with a checkpoint after the first.
struct SavedRun {
  SavedRun() {
    train(model, optimizer, 1, 1);
    save_checkpoint(folder.path(), model, optimizer, {.step = 1});
    train(model, optimizer, 2, 2);
  }
  fs::path checkpoint() const { return folder / "step-00000001"; }
  /// The text with which the checkpoint is refused; nothing was changed then.
  std::string refusal() {
    const auto before = test::weights_of(*model);
    const std::string text = error_of([&] { load_checkpoint(folder.path(), model, optimizer); });
    test::expect_same_weights(*model, before);
    return text;
  }

  test::TemporaryFolder folder;
  Whole model;
  optim::AdamW optimizer{model->parameters(), optim::AdamWOptions(1e-2)};
};

/// As a module with a layer more, a layer less, or other sizes.
struct Other : torch::nn::Module {
  explicit Other(int layers, std::int64_t width = test::kWidth) {
    auto level = register_module("layers", std::make_shared<torch::nn::Module>("Layers"));
    for (int i = 0; i < layers; ++i) {
      auto layer = level->register_module(std::to_string(i), std::make_shared<torch::nn::Module>("Layer"));
      layer->register_parameter("weight", torch::ones({width, width}, at::kDouble));
      layer->register_parameter("bias", torch::ones({width}, at::kDouble));
    }
  }
};

TEST(CheckpointErrors, AnotherModelIsNamedTensorByTensor) {
  SavedRun run;
  const auto refusal = [&](Other other) {
    optim::AdamW optimizer(other.parameters());
    return error_of([&] { load_checkpoint(run.folder.path(), other, optimizer); });
  };
  EXPECT_THAT(refusal(Other(9)), AllOf(HasSubstr("another model; missing are layers.8.bias, layers.8.weight"),
                                       Not(HasSubstr("does not have"))));
  EXPECT_THAT(refusal(Other(7)), HasSubstr("does not have layers.7.bias, layers.7.weight"));
  EXPECT_THAT(refusal(Other(8, 5)),
              AllOf(HasSubstr("layers.0.bias (F64 [6] in the file, F64 [5] in the model)"), HasSubstr("and 6 more")));
  Other narrow(8);
  narrow.to(at::kFloat);
  EXPECT_THAT(refusal(narrow), HasSubstr("(F64 [6] in the file, F32 [6] in the model)"));
  EXPECT_THAT(failure_on_all(2,
                             [&](const auto& comm) {
                               auto layers = test::layered_layers();
                               layers.pop_back();
                               DualPipe pipe(comm, {.num_micro_batches = 4, .schedule = "1f1b"}, split(layers, 2));
                               optim::AdamW optimizer(pipe->parameters());
                               load_checkpoint(run.folder.path(), pipe, optimizer);
                             }),
              HasSubstr("does not have layers.7.bias, layers.7.weight"));
}

TEST(CheckpointErrors, AnotherOptimizerIsNamed) {
  SavedRun run;
  optim::SGD sgd(run.model->parameters(), 0.1);
  EXPECT_THAT(error_of([&] { load_checkpoint(run.folder.path(), run.model, sgd); }),
              AllOf(HasSubstr("AdamW"), HasSubstr("SGD")));
  optim::AdamW part(std::vector<at::Tensor>{run.model->layers[0]->weight});
  EXPECT_THAT(error_of([&] { load_checkpoint(run.folder.path(), run.model, part); }),
              AllOf(HasSubstr("does not train"), HasSubstr("layers.0.bias.exp_avg")));
  EXPECT_TRUE(part.state().empty());

  optim::LBFGS unknown(run.model->parameters());
  EXPECT_THAT(error_of([&] { save_checkpoint(run.folder.path(), run.model, unknown, {.step = 3}); }),
              HasSubstr("SGD, Adam, AdamW, Adagrad and RMSprop"));
  optim::AdamW foreign(std::vector<at::Tensor>{torch::ones({3, 7})});
  EXPECT_THAT(error_of([&] { save_checkpoint(run.folder.path(), run.model, foreign, {.step = 3}); }),
              AllOf(HasSubstr("[3, 7]"), HasSubstr("model->parameters()")));
}

TEST(CheckpointErrors, EveryFileIsCheckedForCutsAndChanges) {
  SavedRun run;
  int files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(run.checkpoint())) {
    if (!entry.is_regular_file()) continue;
    ++files;
    SCOPED_TRACE(entry.path());
    const std::string name = entry.path().string(), whole = detail::read_file(name);
    overwrite(name, whole.substr(0, whole.size() - 3));
    EXPECT_THAT(run.refusal(), HasSubstr(name));
    std::string changed = whole;
    changed[changed.size() / 2] ^= 1;
    overwrite(name, changed);
    EXPECT_THAT(run.refusal(), HasSubstr(name));
    if (entry.path().filename() != "manifest.json") {
      fs::rename(name, name + ".away");
      EXPECT_THAT(run.refusal(), HasSubstr(name));
      fs::rename(name + ".away", name);
    }
    overwrite(name, whole);
  }
  EXPECT_EQ(files, 6);
  EXPECT_EQ(load_checkpoint(run.folder.path(), run.model, run.optimizer).step, 1);
}

TEST(CheckpointErrors, ANewerFormatAndNoCheckpointAreNamed) {
  SavedRun run;
  const fs::path manifest = run.checkpoint() / "manifest.json";
  std::string text = detail::read_file(manifest);
  text.replace(text.find("\"version\": 1"), 12, "\"version\": 2");
  overwrite(manifest, text);
  EXPECT_THAT(run.refusal(), AllOf(HasSubstr("version 2"), HasSubstr("reads 1")));
  overwrite(manifest, "{}");
  EXPECT_THAT(run.refusal(), HasSubstr("no manifest"));
  EXPECT_EQ(latest_checkpoint(run.folder.path()), 1);
  fs::remove(manifest);
  EXPECT_EQ(latest_checkpoint(run.folder.path()), std::nullopt);
  EXPECT_EQ(latest_checkpoint(run.folder / "missing"), std::nullopt);
  EXPECT_THAT(error_of([&] { latest_checkpoint(run.folder.write("file", "")); }), HasSubstr("cannot read"));
  EXPECT_THAT(run.refusal(), HasSubstr("no complete checkpoint in " + run.folder.path().string()));
  EXPECT_THAT(error_of([&] { load_checkpoint(run.folder / "missing", run.model, run.optimizer); }),
              AllOf(HasSubstr("missing"), HasSubstr("no folder")));
}

TEST(CheckpointErrors, NamesOfSeveralStagesNeedAPrefix) {
  const test::TemporaryFolder folder;
  const auto by_hand = [](const std::shared_ptr<Communicator>& comm) {
    return DualPipe(comm, {.num_micro_batches = 4, .schedule = "1f1b"}, [](int stage) { return test::Layer(stage); });
  };
  EXPECT_THAT(failure_on_all(2,
                             [&](const auto& comm) {
                               DualPipe pipe = by_hand(comm);
                               optim::SGD optimizer(pipe->parameters(), 0.1);
                               save_checkpoint(folder.path(), pipe, optimizer);
                             }),
              AllOf(HasSubstr("weight (stages 0 and 1)"), HasSubstr("split()"), HasSubstr("stage_prefix")));
  run_ranks(2, [&](const std::shared_ptr<Communicator>& comm) {
    DualPipe pipe = by_hand(comm);
    optim::AdamW optimizer(pipe->parameters());
    train(pipe, optimizer, 1, 1);
    save_checkpoint(folder.path(), pipe, optimizer, {}, {.stage_prefix = true});
    const auto expected = test::weights_of(*pipe);
    train(pipe, optimizer, 2, 2);
    load_checkpoint(folder.path(), pipe, optimizer);
    test::expect_same_weights(*pipe, expected);
    test::scramble(*pipe);
    load_weights(folder.path(), pipe, {.stage_prefix = true});
    test::expect_same_weights(*pipe, expected);
  });
  EXPECT_THAT(failure_on_all(4,
                             [&](const auto& comm) {
                               DualPipe pipe = by_hand(comm);
                               optim::AdamW optimizer(pipe->parameters());
                               load_checkpoint(folder.path(), pipe, optimizer);
                             }),
              AllOf(HasSubstr("missing are stage2.bias"), HasSubstr("the same cut only")));
}

TEST(CheckpointErrors, RanksThatSeeOtherFoldersAreFound) {
  const test::TemporaryFolder first, second;
  const auto mine = [&](const std::shared_ptr<Communicator>& comm) {
    return (comm->rank() == 1 ? second : first).path().string();
  };
  EXPECT_THAT(failure_on_all(3,
                             [&](const auto& comm) {
                               DualPipe pipe = layered_pipe(comm, "1f1b");
                               optim::AdamW optimizer(pipe->parameters());
                               save_checkpoint(mine(comm), pipe, optimizer);
                             }),
              AllOf(HasSubstr("rank 1: cannot see in " + second.path().string()), HasSubstr("one shared folder")));
  EXPECT_TRUE(fs::is_empty(first.path()));
  for (const auto& folder : {first.path(), second.path()}) {
    Whole model;
    optim::AdamW optimizer(model->parameters());
    save_checkpoint(folder, model, optimizer);
  }
  EXPECT_THAT(failure_on_all(2,
                             [&](const auto& comm) {
                               DualPipe pipe = layered_pipe(comm, "1f1b");
                               optim::AdamW optimizer(pipe->parameters());
                               load_checkpoint(mine(comm), pipe, optimizer);
                             }),
              AllOf(HasSubstr("ranks 0 and 1 see different checkpoints"), HasSubstr("one shared folder")));
}

TEST(CheckpointErrors, RanksThatDisagreeAreShownBoth) {
  const test::TemporaryFolder folder;
  const std::string text = failure_on_all(2, [&](const auto& comm) {
    DualPipe pipe = layered_pipe(comm, "1f1b");
    optim::AdamW optimizer(pipe->parameters(), optim::AdamWOptions(comm->rank() == 0 ? 0.5 : 0.25));
    save_checkpoint(folder.path(), pipe, optimizer);
  });
  EXPECT_THAT(text,
              AllOf(HasSubstr("rank 0: "), HasSubstr("\"lr\":0.5"), HasSubstr("rank 1: "), HasSubstr("\"lr\":0.25")));
}

TEST(CheckpointErrors, ValuesThatCannotBeKeptAreNamed) {
  SavedRun run;
  const auto refusal = [&](const CheckpointExtra& extra) {
    return error_of([&] { save_checkpoint(run.folder.path(), run.model, run.optimizer, extra); });
  };
  EXPECT_THAT(refusal({.step = -1}), HasSubstr("-1"));
  EXPECT_THAT(refusal({.step = 0}), AllOf(HasSubstr("step 0"), HasSubstr("later step 1")));
  EXPECT_THAT(refusal({.step = 2, .values = {{"loss", std::numeric_limits<double>::quiet_NaN()}}}),
              AllOf(HasSubstr("nan"), HasSubstr("loss")));
  EXPECT_THAT(refusal({.step = 2, .values = {{"text", std::string("\xff")}}}), HasSubstr("UTF-8"));
  EXPECT_THAT(refusal({.step = 2, .tensors = {{"sparse", torch::eye(2).to_sparse()}}}), HasSubstr("sparse"));
  EXPECT_THAT(error_of([&] { CheckpointWriter writer(run.folder.path(), {.keep = -1}); }), HasSubstr("-1"));
  EXPECT_THAT(error_of([&] { CheckpointWriter writer(""); }), HasSubstr("empty path"));
  EXPECT_EQ(load_checkpoint(run.folder.path(), run.model, run.optimizer).step, 1);
}

TEST(CheckpointErrors, AFolderThatCannotBeWrittenIsNamed) {
  const test::TemporaryFolder folder;
  const std::string path = folder.write("file", "") + "/below";
  EXPECT_THAT(failure_on_all(2,
                             [&](const auto& comm) {
                               DualPipe pipe = layered_pipe(comm, "1f1b");
                               optim::AdamW optimizer(pipe->parameters());
                               save_checkpoint(path, pipe, optimizer);
                             }),
              AllOf(HasSubstr(path), HasSubstr("Not a directory")));
}

/// As a full disk: files of this process end after so many bytes.
class FileLimit {
 public:
  explicit FileLimit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &before_);
    rlimit limit = before_;
    limit.rlim_cur = bytes;
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, SIG_DFL);
  }
  FileLimit(const FileLimit&) = delete;
  FileLimit& operator=(const FileLimit&) = delete;

 private:
  rlimit before_{};
};

TEST(CheckpointErrors, AFullDiskLeavesOldCheckpointsAndTheNextSaveWorks) {
  for (const auto& [asynchronous, replicas] : {std::pair(false, 1), {true, 1}, {true, 2}}) {
    const test::TemporaryFolder folder;
    run_ranks(2 * replicas, [&, in_background = asynchronous, data = replicas](const auto& comm) {
      const Mesh mesh(comm, {.pipeline = 2, .data = data});
      DualPipe pipe = layered_pipe(mesh, "dualpipe");
      optim::AdamW optimizer(pipe->parameters());
      CheckpointWriter writer(folder.path(), {.keep = 1, .asynchronous = in_background});
      writer.save(pipe, optimizer, {.step = 1});
      writer.wait();
      const auto expected = test::weights_of(*pipe);
      train(pipe, optimizer, 1, 1);
      comm->barrier().wait();
      {
        std::unique_ptr<FileLimit> limit;
        if (comm->rank() == 0) limit = std::make_unique<FileLimit>(1000);
        comm->barrier().wait();
        EXPECT_THAT(error_of([&] {
                      writer.save(pipe, optimizer, {.step = 2});
                      writer.wait();
                    }),
                    AllOf(HasSubstr("stage-0000"), HasSubstr("File too large")));
        comm->barrier().wait();
      }
      comm->barrier().wait();
      EXPECT_EQ(load_checkpoint(folder.path(), pipe, optimizer).step, 1);
      test::expect_same_weights(*pipe, expected);
      EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
      train(pipe, optimizer, 1, 1);
      comm->barrier().wait();
      writer.save(pipe, optimizer, {.step = 2});
      writer.wait();
      EXPECT_EQ(load_checkpoint(folder.path(), pipe, optimizer).step, 2);
    });
  }
}

// --- several pipelines

/// The one text with which all ranks of two pipelines are refused. Weights are what they were then, and a step works.
std::string refusal_of_mesh(
    const std::function<void(DualPipe& pipe, optim::Optimizer& optimizer, const Mesh& mesh)>& call) {
  return failure_on_all(4, [&](const auto& comm) {
    const Mesh mesh(comm, {.pipeline = 2, .data = 2});
    DualPipe pipe = layered_pipe(mesh, "dualpipe");
    optim::AdamW optimizer(pipe->parameters(), optim::AdamWOptions(1e-2));
    const auto before = test::weights_of(*pipe);
    const std::string text = error_of([&] { call(pipe, optimizer, mesh); });
    test::expect_same_weights(*pipe, before);
    EXPECT_TRUE(optimizer.state().empty());
    train(pipe, optimizer, 1, 1);
    throw InvalidArgument(text);
  });
}

std::string load_on_mesh(const fs::path& folder) {
  return refusal_of_mesh([&](auto& pipe, auto& optimizer, const auto&) { load_checkpoint(folder, pipe, optimizer); });
}

TEST(CheckpointErrorsOfAMesh, WhatDoesNotFitIsNamedOnAllRanks) {
  const auto refusal = [](Other other) {
    const test::TemporaryFolder folder;
    optim::AdamW optimizer(other.parameters());
    save_checkpoint(folder.path(), other, optimizer);
    return load_on_mesh(folder.path());
  };
  EXPECT_THAT(refusal(Other(9)), HasSubstr("the model does not have layers.8.bias, layers.8.weight"));
  EXPECT_THAT(refusal(Other(7)), HasSubstr("another model; missing are layers.7.bias, layers.7.weight"));
  EXPECT_THAT(refusal(Other(8, 5)), HasSubstr("layers.0.bias (F64 [5] in the file, F64 [6] in the model)"));
  SavedRun run;
  EXPECT_THAT(refusal_of_mesh([&](auto& pipe, auto& optimizer, const auto&) {
                optim::SGD sgd(pipe->parameters(), 0.1);
                EXPECT_TRUE(optimizer.state().empty());
                load_checkpoint(run.folder.path(), pipe, sgd);
              }),
              HasSubstr("of the optimizer AdamW, here it is SGD"));
}

TEST(CheckpointErrorsOfAMesh, DamageIsNamedOnAllRanks) {
  SavedRun run;
  for (const std::string file : {"stage-00000.safetensors", "optimizer/stage-00000.safetensors",
                                 "model.safetensors.index.json", "manifest.json"}) {
    SCOPED_TRACE(file);
    const std::string name = run.checkpoint() / file, whole = detail::read_file(name);
    overwrite(name, whole.substr(0, whole.size() / 2));
    EXPECT_THAT(load_on_mesh(run.folder.path()), HasSubstr(name));
    std::string changed = whole;
    changed[changed.size() / 2] ^= 1;
    overwrite(name, changed);
    EXPECT_THAT(load_on_mesh(run.folder.path()), HasSubstr(name));
    overwrite(name, whole);
  }
  std::string text = detail::read_file(run.checkpoint() / "manifest.json");
  text.replace(text.find("\"version\": 1"), 12, "\"version\": 2");
  overwrite(run.checkpoint() / "manifest.json", text);
  EXPECT_THAT(load_on_mesh(run.folder.path()), AllOf(HasSubstr("version 2"), HasSubstr("reads 1")));
}

TEST(CheckpointErrorsOfAMesh, FoldersThatCannotBeUsedAreNamedOnAllRanks) {
  const test::TemporaryFolder first, second;
  const auto own = [&](const Mesh& mesh) { return mesh.replica() == 1 ? second.path() : first.path(); };
  EXPECT_THAT(refusal_of_mesh(
                  [&](auto& pipe, auto& optimizer, const Mesh& mesh) { save_checkpoint(own(mesh), pipe, optimizer); }),
              AllOf(HasSubstr("rank 1: cannot see in " + second.path().string()), HasSubstr("rank 3: cannot see"),
                    HasSubstr("one shared folder")));
  EXPECT_TRUE(fs::is_empty(first.path()));
  EXPECT_TRUE(fs::is_empty(second.path()));
  for (const auto& folder : {first.path(), second.path()}) {
    Whole model;
    optim::AdamW optimizer(model->parameters());
    save_checkpoint(folder, model, optimizer);
  }
  EXPECT_THAT(refusal_of_mesh(
                  [&](auto& pipe, auto& optimizer, const Mesh& mesh) { load_checkpoint(own(mesh), pipe, optimizer); }),
              HasSubstr("ranks 0 and 1 see different checkpoints"));
  EXPECT_THAT(load_on_mesh(first / "missing"), AllOf(HasSubstr("missing"), HasSubstr("no folder")));
  const std::string below = first.write("file", "") + "/below";
  EXPECT_THAT(
      refusal_of_mesh([&](auto& pipe, auto& optimizer, const auto&) { save_checkpoint(below, pipe, optimizer); }),
      AllOf(HasSubstr(below), HasSubstr("Not a directory")));
}

TEST(CheckpointErrors, WeightsOfOtherSizesChangeNothing) {
  const test::TemporaryFolder folder;
  Whole model;
  const auto before = test::weights_of(*model);
  auto weights = before;
  weights["layers.3.weight"] = torch::ones({6});
  weights["layers.4.weight"] = torch::ones({6, 6}, at::kLong);
  write_safetensors(folder / "model.safetensors", weights);
  EXPECT_THAT(error_of([&] { load_weights(folder.path(), model); }),
              AllOf(HasSubstr("layers.3.weight (F32 [6] in the file, F64 [6, 6] in the model)"),
                    HasSubstr("layers.4.weight (I64 [6, 6] in the file")));
  test::expect_same_weights(*model, before);
  folder.write("outside.json", R"({"weight_map": {"layers.0.bias": "../file"}})");
  EXPECT_THAT(error_of([&] { load_weights(folder / "outside.json", model); }), HasSubstr("../file"));
}

}  // namespace
}  // namespace dualpipe
