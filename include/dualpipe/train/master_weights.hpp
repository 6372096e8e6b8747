#pragma once

#include <cstddef>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/config.hpp"

namespace torch::optim {
class Optimizer;
}

namespace dualpipe {

/// Float32 copies of bfloat16 and float16 parameters, which an optimizer updates in their place: a step too small for the
/// parameter's few digits adds up in its copy. Parameters of other types stand for themselves.
///
///     torch::optim::AdamW optimizer(pipe->parameters());
///     MasterWeights weights(pipe->parameters());
///     …
///     optimizer.zero_grad();
///     pipe->step(batch, loss);  // DualPipeOptions::gradient_dtype = float32
///     weights.step(optimizer);  // in place of optimizer.step()
///
/// Every rank has those of its parameters, and copies of a stage stay equal as they do without them.
class MasterWeights {
 public:
  /// Copies the values.
  ///
  /// @throws InvalidArgument  a parameter that is undefined, not a leaf of the graph, or comes twice.
  DUALPIPE_DECL explicit MasterWeights(Tensors parameters);

  /// A step of the optimizer, which has parameters() or some of them, on the copies; it keeps its states in float32. In
  /// between it knows the parameters, as a checkpoint and set_learning_rate() want it. What it throws comes through, and
  /// parameters are then what they were.
  DUALPIPE_DECL void step(torch::optim::Optimizer& optimizer);

  /// In the order of parameters().
  const Tensors& masters() const noexcept { return masters_; }
  const Tensors& parameters() const noexcept { return parameters_; }

  // The parts of step(), for an optimizer of masters().
  /// Each copy's gradient becomes that of its parameter: the same tensor where it is float32, none where there is none.
  /// Where a parameter is no longer its copy, rounded, as after loading weights, the copy begins anew from it.
  DUALPIPE_DECL void take_gradients();
  /// Parameters become their copies' values, rounded; the copies let go of their gradients.
  DUALPIPE_DECL void write_back();

 private:
  bool is_copy(std::size_t index) const { return !masters_[index].is_same(parameters_[index]); }

  Tensors parameters_;
  Tensors masters_;
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/train/master_weights.ipp"
#endif
