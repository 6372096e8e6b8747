#include "train.hpp"

#include <torch/torch.h>

#include <iostream>
#include <memory>

#include "dualpipe/dualpipe.hpp"

namespace {

torch::nn::Linear layer(int stage) {
  torch::nn::Linear linear(torch::nn::LinearOptions(4, 4));
  linear->to(torch::kDouble);
  torch::NoGradGuard no_grad;
  linear->weight.copy_(torch::arange(16, torch::kDouble).reshape({4, 4}).div(10 + stage).sin());
  linear->bias.fill_(0.1 * (stage + 1));
  return linear;
}

}  // namespace

void train(const std::shared_ptr<dualpipe::Communicator>& communicator) {
  at::set_num_threads(1);
  const int rank = communicator->rank();
  const torch::Tensor inputs = torch::arange(16, torch::kDouble).reshape({4, 4}).cos();
  const torch::Tensor targets = torch::arange(16, torch::kDouble).reshape({4, 4}).sin();

  auto first = layer(0), second = layer(1);
  torch::Tensor expected_loss = torch::mse_loss(second(first(inputs)), targets);
  expected_loss.backward();

  dualpipe::DualPipe pipe(communicator, dualpipe::DualPipeOptions{.num_micro_batches = 4},
                          [](int stage) { return dualpipe::as_stage(layer(stage)); });
  dualpipe::Batch batch{.inputs = {inputs}, .targets = {targets}};
  const auto result = pipe->step(batch, [](const dualpipe::Tensors& outputs, const dualpipe::Tensors& micro_targets) {
    return torch::mse_loss(outputs[0], micro_targets[0]);
  });
  TORCH_CHECK(torch::allclose(result.loss, expected_loss.detach(), 1e-12, 0), "rank ", rank, ": loss ",
              result.loss.item<double>(), ", expected ", expected_loss.item<double>());
  // Both ranks hold both stages.
  const auto parameters = pipe->named_parameters();
  const auto& gradient = parameters["stage0.weight"].grad();
  TORCH_CHECK(torch::allclose(gradient, first->weight.grad(), 1e-12, 1e-14), "rank ", rank, ": gradient of stage 0\n",
              gradient, "\nexpected\n", first->weight.grad());
  if (rank == 0) std::cout << "loss " << expected_loss.item<double>() << " on two ranks as in one piece\n";
}
