#pragma once

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// Float32 copies of bfloat16 and float16 parameters, for an optimizer to train: a step too small for the parameter's
/// few digits adds up in its copy. Parameters of other types stand for themselves.
///
///     MasterWeights weights(pipe->parameters());
///     torch::optim::AdamW optimizer(weights.masters());
///     …
///     pipe->zero_grad();
///     pipe->step(batch, loss);  // DualPipeOptions::gradient_dtype = float32
///     pipe->clip_grad_norm_(1.0);
///     weights.step(optimizer);
///
/// Every rank has those of its parameters, and copies of a stage stay equal as they do without them.
class MasterWeights {
 public:
  /// Copies the values.
  ///
  /// @throws InvalidArgument  a parameter that is undefined, not a leaf of the graph, or comes twice.
  DUALPIPE_DECL explicit MasterWeights(Tensors parameters);

  /// In the order of parameters(): what the optimizer gets.
  const Tensors& masters() const noexcept { return masters_; }
  const Tensors& parameters() const noexcept { return parameters_; }

  /// take_gradients(), a step of the optimizer, write_back().
  template <class Optimizer>
  void step(Optimizer& optimizer) {
    take_gradients();
    optimizer.step();
    write_back();
  }
  /// Each copy's gradient becomes that of its parameter: the same tensor where it is float32, none where there is none.
  DUALPIPE_DECL void take_gradients();
  /// Parameters become their copies' values, rounded; the copies let go of their gradients.
  DUALPIPE_DECL void write_back();
  /// The copies become the parameters' values: after weights were loaded by other means than the optimizer.
  DUALPIPE_DECL void take_values();

 private:
  Tensors parameters_;
  Tensors masters_;
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/train/master_weights.ipp"
#endif
