#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <string>

#include "train/layered.hpp"

namespace dualpipe::test {

/// Gradients that follow from the step and the name of a parameter alone, so that any process finds the state of any
/// step. Names of a pipeline begin with "stage<k>.", which does not count.
inline void seeded_step(torch::nn::Module& model, torch::optim::Optimizer& optimizer, int step) {
  for (const auto& item : model.named_parameters()) {
    const std::string name = item.key().substr(item.key().find("layers."));
    at::Tensor parameter = item.value();
    parameter.mutable_grad() =
        seeded(parameter.sizes().vec(), std::hash<std::string>{}(name) + static_cast<std::uint64_t>(step));
  }
  optimizer.step();
}

}  // namespace dualpipe::test
