#pragma once

#include <sys/prctl.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>

// Work that takes a given time and no core, so that eight ranks fit on two.

/// Of this thread and those it starts.
inline void sleep_precisely() {
  prctl(PR_SET_TIMERSLACK, 1000);  // nanoseconds; the default of 50 us would lengthen every sleep
}

inline void sleep_for(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

/// How long to sleep so that it takes `seconds` on this machine, whose timers and scheduler add their part.
inline double calibrated(double seconds) {
  const int rounds = 50;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < rounds; ++i) sleep_for(seconds);
  const double mean = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / rounds;
  return std::max(0.0, 2 * seconds - mean);
}

struct Passes {
  double seconds = 0;  ///< of each: forward, input gradient, weight gradient
  bool first = false;  ///< nobody asks the first stage for an input gradient; it takes the time all the same
};

/// Passes that take a given time.
struct Sleep : torch::autograd::Function<Sleep> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& weight, const Passes* passes) {
    context->saved_data["passes"] = reinterpret_cast<std::int64_t>(passes);
    sleep_for(passes->seconds);
    return x * weight;
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list gradients) {
    const auto* passes = reinterpret_cast<const Passes*>(context->saved_data["passes"].toInt());
    const bool weight = context->needs_input_grad(1);
    if (passes->first || context->needs_input_grad(0)) sleep_for(passes->seconds);
    if (weight) sleep_for(passes->seconds);
    return {gradients[0], weight ? gradients[0].sum() : torch::Tensor(), torch::Tensor()};
  }
};
