#pragma once

#include <cstdint>
#include <memory>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// As those of torch.amp.GradScaler, in the order in which a reader sets them.
struct GradScalerOptions {
  double scale = 65536;  ///< in the first step
  double growth = 2;     ///< factor of the scale after `growth_interval` steps that were finite
  double backoff = 0.5;  ///< factor of the scale after a step that was not
  int growth_interval = 2000;
};

/// Keeps the small gradients of float16 from becoming zero: scales what enters the backward, and divides the gradients
/// by that before they are used. Where one of them has become infinite or NaN on any rank, the optimizer's step is left
/// out on all ranks, and the scale falls.
///
///     GradScaler scaler(pipe->communicator());  // with a mesh: mesh.world()
///     …
///     const auto scaled = [&](const Tensors& outputs, const Tensors& targets) { return scaler.scale(loss(outputs, targets)); };
///     pipe->step(batch, scaled);                // DualPipeOptions::on_non_finite = keep
///     if (scaler.unscale_(pipe->parameters())) optimizer.step();
///     scaler.update();
class GradScaler {
 public:
  /// Collective.
  ///
  /// @param world  all ranks that train the model.
  /// @throws InvalidArgument  on every rank: options out of range, or that differ between ranks.
  DUALPIPE_DECL explicit GradScaler(std::shared_ptr<Communicator> world, const GradScalerOptions& options = {});

  /// The loss with its value as it is, in float32 at least, whose backward begins with the scale times the gradient that
  /// enters it. For loss functions; one that requires no grad, as in evaluate(), is returned as it is.
  DUALPIPE_DECL at::Tensor scale(const at::Tensor& loss) const;

  /// Collective, once before each update(). Divides the gradients by the scale. Clip afterwards.
  ///
  /// @param parameters  all of this rank's; their gradients in float32 (DualPipeOptions::gradient_dtype), float64, or
  ///                    bfloat16.
  /// @param skipped     StepResult::skipped, where on_non_finite is skip.
  /// @return            whether all gradients of all ranks are finite, and the step was not skipped: the optimizer may
  ///                    use them.
  /// @throws InvalidArgument  on every rank, gradients are what they were: no rank has a gradient and none says
  ///                          `skipped`, a gradient in float16, a second call before update(). The communicator stays
  ///                          usable.
  DUALPIPE_DECL bool unscale_(const Tensors& parameters, bool skipped = false);

  /// Ends the optimizer's step: the scale falls after one that was left out, and grows when it is time.
  ///
  /// @throws InvalidArgument  unscale_() was not called before.
  DUALPIPE_DECL void update();

  DUALPIPE_DECL double current_scale() const;
  /// Steps since the scale has changed.
  DUALPIPE_DECL std::int64_t growth_tracker() const;
  /// Goes on with what current_scale() and growth_tracker() were when a checkpoint was saved.
  ///
  /// @throws InvalidArgument  a scale that is not positive and finite, a negative tracker.
  DUALPIPE_DECL void restore(double scale, std::int64_t growth_tracker);

 private:
  std::shared_ptr<Communicator> world_;
  GradScalerOptions options_;
  at::Tensor scale_;           // float32 [1] on the host, as the next two
  at::Tensor growth_tracker_;  // int32 [1]
  at::Tensor found_infinite_;  // float32 [1]; undefined: unscale_() was not called
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/train/grad_scaler.ipp"
#endif
