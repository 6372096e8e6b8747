#include <torch/torch.h>
#include <dualpipe/dualpipe.hpp>

#include <iostream>

using namespace dualpipe;

void train(const World& world) {
  auto comm = connect_sockets(world);
  const int stages = comm->size();  // DualPipe: as many stages as ranks, each on two of them
  DualPipe pipe(comm, {.num_micro_batches = 2 * stages}, [&](int stage) {
    if (stage + 1 == stages) return torch::nn::Sequential(torch::nn::Linear(64, 10));
    return torch::nn::Sequential(torch::nn::Linear(64, 64), torch::nn::GELU());
  });
  torch::optim::AdamW optimizer(pipe->parameters(), torch::optim::AdamWOptions(1e-2));

  torch::manual_seed(0);  // the same data on every rank
  const auto x = torch::randn({512, 64});
  const auto y = x.narrow(1, 0, 10).argmax(1);
  for (int step = 0; step <= 50; ++step) {
    optimizer.zero_grad();
    const StepResult result = pipe->step({.inputs = {x}, .targets = {y}}, torch::nn::CrossEntropyLoss());
    optimizer.step();
    if (comm->rank() == 0 && step % 10 == 0)
      std::cout << "step " << step << "  loss " << result.loss.item<double>() << std::endl;
  }
}

int main() {
  World world;
  try {
    train(world = World::from_env());
  } catch (const std::exception& error) {
    report_failure(world, error);
    return 1;
  }
}
