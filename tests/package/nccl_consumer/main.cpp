// One step on a GPU, compared with the same step on the CPU; without a GPU, the error that says so.
#include <torch/torch.h>

#include <cmath>
#include <cstdlib>
#include <iostream>
#include <string>

#include "dualpipe/comm/nccl.hpp"
#include "dualpipe/dualpipe.hpp"

namespace {

torch::nn::Linear layer() {
  torch::nn::Linear linear(torch::nn::LinearOptions(4, 4));
  torch::NoGradGuard no_grad;
  linear->weight.copy_(torch::arange(16, torch::kFloat).reshape({4, 4}).div(10).sin());
  linear->bias.fill_(0.1);
  return linear;
}

void train(const std::shared_ptr<dualpipe::Communicator>& communicator) {
  const torch::Tensor inputs = torch::arange(16, torch::kFloat).reshape({4, 4}).cos();
  const torch::Tensor targets = torch::arange(16, torch::kFloat).reshape({4, 4}).sin();
  auto alone = layer();
  const torch::Tensor expected = torch::mse_loss(alone(inputs), targets);

  dualpipe::DualPipe pipe(communicator, dualpipe::DualPipeOptions{.num_micro_batches = 4, .schedule = "1f1b"},
                          [](int) { return dualpipe::as_stage(layer()); });
  const at::Device device = communicator->device();
  TORCH_CHECK(device.is_cuda() && pipe->parameters()[0].device() == device, "parameters are not on ", device);
  const dualpipe::Batch batch{.inputs = {inputs.to(device)}, .targets = {targets.to(device)}};
  const auto result = pipe->step(batch, [](const dualpipe::Tensors& outputs, const dualpipe::Tensors& micro_targets) {
    return torch::mse_loss(outputs[0], micro_targets[0]);
  });
  TORCH_CHECK(std::abs(result.loss.item<double>() - expected.item<double>()) < 1e-5, "loss ",
              result.loss.item<double>(), " on ", device, ", expected ", expected.item<double>());
  std::cout << "loss " << expected.item<double>() << " on " << device << " as on the CPU\n";
}

}  // namespace

int main() {
  try {
    train(dualpipe::connect_nccl(dualpipe::World{}));
    return EXIT_SUCCESS;
  } catch (const dualpipe::InvalidArgument& error) {
    const std::string what = error.what();
    if (torch::cuda::is_available() || what.find("no CUDA device") == std::string::npos) throw;
    std::cout << "as expected without a GPU: " << what << '\n';
    return EXIT_SUCCESS;
  }
}
