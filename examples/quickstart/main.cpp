#include <torch/torch.h>
#include <dualpipe/dualpipe.hpp>

#include <iostream>

using namespace dualpipe;

int main() {
  auto comm = connect_sockets(World::from_env());
  const int stages = comm->size();  // DualPipe: as many stages as ranks, each on two of them
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 2 * stages}, [&](int stage) {
    if (stage + 1 == stages) return as_stage(torch::nn::Linear(64, 10));
    return as_stage(torch::nn::Sequential(torch::nn::Linear(64, 64), torch::nn::GELU()));
  });
  torch::optim::AdamW optimizer(pipe->parameters(), torch::optim::AdamWOptions(1e-2));

  torch::manual_seed(0);  // the same data on every rank
  const auto x = torch::randn({512, 64});
  const auto y = x.narrow(1, 0, 10).argmax(1);
  for (int step = 0; step <= 50; ++step) {
    optimizer.zero_grad();
    const StepResult result = pipe->step(
        {.inputs = {x}, .targets = {y}},
        [](const Tensors& out, const Tensors& target) { return torch::cross_entropy_loss(out[0], target[0]); });
    optimizer.step();
    if (comm->rank() == 0 && step % 10 == 0)
      std::cout << "step " << step << "  loss " << result.loss.item<double>() << std::endl;
  }
}
