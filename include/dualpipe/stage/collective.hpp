#pragma once

#include <any>
#include <functional>
#include <memory>
#include <vector>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/config.hpp"

namespace dualpipe {

struct StageContext;

/// Communication inside a stage, with a backward of its own: a dispatch or combine of experts, a gather of shards, or
/// what a library such as DeepEP or NCCL offers. Runs while the host computes something else.
///
/// All ranks that take part run the same stage on micro-batches of the same number, and so launch their collectives in
/// the same order, which depends on the structure of the stages only. Both functions are called on the rank's thread
/// and must not wait for other ranks.
///
/// Right: launch in forward(), finish in the Pending's take().  Wrong: to wait in forward() for sizes that peers send:
/// the compute that should hide it has not begun.
class Collective {
 public:
  struct Launched {
    Pending pending;               ///< take() gives one tensor per input, of any shape
    std::shared_ptr<void> handle;  ///< what the backward needs; may be null, may be completed by take()
  };

  virtual ~Collective() = default;

  /// Called as soon as the inputs are computed; forward() may follow later, behind other work of the device. Starts what
  /// forward() would have to wait for: a copy of sizes to the host. Not called where the stage begins with the
  /// collective.
  ///
  /// @param inputs  as forward() gets them.
  /// @return what forward() finds in StageContext::prepared; may be empty.
  virtual std::any prepare(const Tensors& /*inputs*/) { return {}; }

  /// @param inputs  what the node moves: detached, requires_grad() saying which are differentiable; may be undefined.
  ///                They may be kept, but not written to.
  /// @return the tensors to come are detached and held by nobody else; their requires_grad() says which of them have a
  ///         gradient.
  virtual Launched forward(Tensors inputs, const StageContext& context) = 0;

  /// The adjoint. Called at most once per forward, after its Pending was taken; not at all outside of training.
  ///
  /// @param output_gradients  one per output; undefined where nothing flows in, on this rank.
  /// @return its tensors are one gradient per input; undefined where nothing flows out or the input has no gradient.
  virtual Pending backward(std::shared_ptr<void> handle, Tensors output_gradients) = 0;
};

/// Several communications as one. take() waits for all and gives what `finish` makes of their results; span() reaches
/// from the earliest begin to the latest end.
///
/// @param parts  may be empty, where there is nothing to communicate.
DUALPIPE_DECL Pending join(std::vector<Pending> parts, std::function<Tensors(std::vector<Tensors> results)> finish);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/stage/collective.ipp"
#endif
