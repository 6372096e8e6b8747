// Trains a small convolutional network on generated pictures and says how many it recognizes. single.cpp does so in one
// process, pipeline.cpp in a pipeline; docs/porting.md explains every line in which they differ.

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>
#include <dualpipe/dualpipe.hpp>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <numbers>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

namespace nn = torch::nn;
using torch::Tensor;
using namespace dualpipe;

constexpr std::int64_t kClasses = 4, kSize = 16, kPictures = 1000, kTestPictures = 400, kBatch = 64;
constexpr std::int64_t kStepsPerEpoch = (kPictures + kBatch - 1) / kBatch;
constexpr std::int64_t kEpochs = 6;
constexpr double kLearningRate = 5e-3;
constexpr int kMicroBatches = 8;

/// In noise: a bar that lies, one that stands, both, or none.
class Pictures : public torch::data::datasets::Dataset<Pictures> {
 public:
  Pictures(std::int64_t count, std::uint64_t seed) {
    at::Generator random = at::detail::createCPUGenerator(seed);
    labels_ = torch::randint(kClasses, {count}, random, torch::kInt64);
    pictures_ = torch::randn({count, 1, kSize, kSize}, random);
    const Tensor places = torch::randint(kSize, {count, 2}, random, torch::kInt64);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto label = labels_[i].item<std::int64_t>();
      if (label % 2 == 0) pictures_[i][0].select(0, places[i][0].item<std::int64_t>()) += 2;
      if (label < 2) pictures_[i][0].select(1, places[i][1].item<std::int64_t>()) += 2;
    }
  }
  torch::data::Example<> get(std::size_t index) override {
    const auto i = static_cast<std::int64_t>(index);
    return {pictures_[i], labels_[i]};
  }
  std::optional<std::size_t> size() const override { return static_cast<std::size_t>(labels_.size(0)); }

 private:
  Tensor pictures_, labels_;
};

class BlockImpl : public nn::Module {
 public:
  BlockImpl(std::int64_t in, std::int64_t out)
      : conv_(register_module("conv", nn::Conv2d(nn::Conv2dOptions(in, out, 3).padding(1).bias(false)))),
        norm_(register_module("norm", nn::BatchNorm2d(out))) {}
  Tensor forward(const Tensor& x) { return torch::max_pool2d(torch::relu(norm_(conv_(x))), 2); }

 private:
  nn::Conv2d conv_;
  nn::BatchNorm2d norm_;
};
TORCH_MODULE(Block);

class HeadImpl : public nn::Module {
 public:
  HeadImpl(std::int64_t in, std::int64_t width)
      : dropout_(register_module("dropout", nn::Dropout(0.2))),
        hidden_(register_module("hidden", nn::Linear(in, width))),
        out_(register_module("out", nn::Linear(width, kClasses))) {}
  Tensor forward(const Tensor& x) { return out_(dropout_(torch::relu(hidden_(x.flatten(1))))); }

 private:
  nn::Dropout dropout_;
  nn::Linear hidden_, out_;
};
TORCH_MODULE(Head);

nn::Sequential make_model() {
  return nn::Sequential(
      {{"block1", Block(1, 16)}, {"block2", Block(16, 32)}, {"block3", Block(32, 32)}, {"head", Head(128, 64)}});
}

/// The mean loss, and how many answers are right.
std::tuple<Tensor, Tensor> loss_and_right(const Tensor& output, const Tensor& target) {
  return {nn::functional::cross_entropy(output, target), output.argmax(1).eq(target).sum()};
}

/// Over many batches.
struct Sums {
  double loss = 0, right = 0, count = 0;
  void add(const Tensor& mean_loss, const Tensor& num_right, std::int64_t samples) {
    loss += mean_loss.item<double>() * static_cast<double>(samples);
    right += num_right.item<double>();
    count += static_cast<double>(samples);
  }
};

/// Epochs `begin` to `end` of kEpochs; `folder` keeps what those before have learned.
void train(const std::shared_ptr<Communicator>& comm, const std::string& folder, std::int64_t begin, std::int64_t end) {
  torch::manual_seed(1);
  DualPipe model(comm,
                 {.num_micro_batches = kMicroBatches,
                  .buffers = {{"running_mean", BufferReduction::mean}, {"running_var", BufferReduction::mean}}},
                 split(layers_of(make_model()), comm->size()));

  std::vector<Tensor> weights, others;  // biases and norms do not decay
  for (const Tensor& parameter : model->parameters()) (parameter.dim() > 1 ? weights : others).push_back(parameter);
  using Group = torch::optim::OptimizerParamGroup;
  using Options = torch::optim::AdamWOptions;
  torch::optim::AdamW optimizer({Group(weights, std::make_unique<Options>(Options().weight_decay(0.05))),
                                 Group(others, std::make_unique<Options>(Options().weight_decay(0)))});
  if (begin > 0) load_checkpoint(folder, model, optimizer);

  using torch::data::transforms::Stack;
  const auto data = torch::data::make_data_loader(Pictures(kPictures, 1).map(Stack<>()), kBatch);
  const auto test_data = torch::data::make_data_loader<torch::data::samplers::SequentialSampler>(
      Pictures(kTestPictures, 2).map(Stack<>()), kBatch);

  const auto print = [&](std::int64_t epoch, const char* what, const Sums& sums) {
    if (comm->rank() != 0) return;
    std::printf("epoch %d  %s loss %.6f  accuracy %.4f\n", static_cast<int>(epoch), what, sums.loss / sums.count,
                sums.right / sums.count);
  };
  std::int64_t step = begin * kStepsPerEpoch;
  const auto run = [&](auto& loader, bool trains) {
    model->train(trains);
    const torch::AutoGradMode with_gradients(trains);
    Sums sums;
    for (const auto& batch : loader) {
      const double done = static_cast<double>(step) / static_cast<double>(kEpochs * kStepsPerEpoch);
      for (auto& group : optimizer.param_groups())
        group.options().set_lr(kLearningRate * (1 + std::cos(std::numbers::pi * done)) / 2);
      optimizer.zero_grad();
      const Batch parts = Batch{.inputs = {batch.data}, .targets = {batch.target}}.chunk(kMicroBatches);
      const StepResult result = trains ? model->step(parts, loss_and_right) : model->evaluate(parts, loss_and_right);
      if (trains) {
        model->clip_grad_norm_(1.0);
        optimizer.step();
        ++step;
      }
      sums.add(result.loss, result.metrics[0], batch.target.size(0));
    }
    return sums;
  };
  print(begin, "test ", run(*test_data, false));
  for (std::int64_t epoch = begin; epoch < end; ++epoch) {
    // A run that goes on sees the batches that it would have seen without stopping.
    torch::manual_seed(static_cast<std::uint64_t>(epoch));
    print(epoch + 1, "train", run(*data, true));
    print(epoch + 1, "test ", run(*test_data, false));
  }
  std::filesystem::create_directories(folder);
  save_checkpoint(folder, model, optimizer, {.step = step});
}

}  // namespace

int main(int argc, char** argv) {
  World world;
  try {
    TORCH_CHECK(argc == 4, "usage: ", argv[0], " FOLDER FIRST-EPOCH LAST-EPOCH");
    train(connect_sockets(world = World::from_env()), argv[1], std::stoi(argv[2]), std::stoi(argv[3]));
  } catch (const std::exception& error) {
    report_failure(world, error);
    return 1;
  }
}
